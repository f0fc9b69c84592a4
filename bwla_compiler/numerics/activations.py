"""Activations rounded to a few bits per token: symmetric integers, scale = max |x| / (2^(bits-1) - 1)."""

import torch
from torch import Tensor

from bwla_compiler.spec import FLOAT_BITS


def quantize_activation(x: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Return (codes [..., n] int8, scale [..., 1] float32), x ~ codes * scale; round half to even.

    x [..., n] float; bits 2 to 8. The scale is 1 where the row is zero. Every kernel must equal this.
    """
    assert 2 <= bits <= 8, f"activations of {bits} bits have no int8 codes"
    qmax = 2 ** (bits - 1) - 1
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / qmax
    scale = torch.where(scale > 0, scale, 1.0)  # a zero row, or one so small that the quotient underflows
    codes = (x / scale).round().clamp(-qmax, qmax).to(torch.int8)
    return codes, scale


def fake_quantize(x: Tensor, *, bits: int) -> Tensor:
    """Return x [..., n] rounded to the given bits, in its own dtype; x itself from 16 bits on."""
    if bits >= FLOAT_BITS:
        return x
    codes, scale = quantize_activation(x, bits=bits)
    return (codes * scale).to(x.dtype)

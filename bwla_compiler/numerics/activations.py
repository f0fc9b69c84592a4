"""Activations rounded to integers per token: symmetric, scale = max |x| / (2^(bits-1) - 1)."""

import torch
from torch import Tensor

from bwla_compiler.spec import FLOAT_BITS

FIXED_POINT_LIMIT = 32767
"""Largest of the integers that stand for floats where codes of 4 bits are multiplied: 16 bits."""


def quantize_activation(x: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Return (codes [..., n] int8, scale [..., 1] float32), x ~ codes * scale; round half to even.

    x [..., n] float; bits 2 to 8. The scale is 1 where the row is zero. Every kernel must equal this.
    """
    assert 2 <= bits <= 8, f"activations of {bits} bits have no int8 codes"
    codes, scale = _rounded(x.float(), 2 ** (bits - 1) - 1)
    return codes.to(torch.int8), scale


def fixed_point(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (integers [..., n] of 16 bits as float32, scale [..., 1] float32), x ~ integers * scale; half to even.

    x [..., n] float. The scale is 1 where the row is zero. Every kernel on the CPU must equal this.
    """
    return _rounded(x.float(), FIXED_POINT_LIMIT)


def _rounded(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / limit
    scale = torch.where(scale > 0, scale, 1.0)  # a zero row, or one so small that the quotient underflows
    return (x / scale).round().clamp(-limit, limit), scale


def fake_quantize(x: Tensor, *, bits: int) -> Tensor:
    """Return x [..., n] rounded to the given bits, in its own dtype; x itself from 16 bits on."""
    if bits >= FLOAT_BITS:
        return x
    codes, scale = quantize_activation(x, bits=bits)
    return (codes * scale).to(x.dtype)

"""float16 values kept as int16 bits beside one power of two, so that a cast of a model's dtype cannot touch them.

`from_pretrained(dtype=bfloat16)` and `model.half()` cast every float buffer; integer buffers they leave alone.
"""

import math

import torch
from torch import Tensor

from bwla_compiler.errors import WeightError

TOP_EXPONENT = 8
"""The largest magnitude is stored in [2^7, 2^8): far below overflow (2^16), and 2^21 above the first subnormal."""


def to_half_bits(x: Tensor) -> tuple[Tensor, int]:
    """Return (bits, e): int16 bits of float16(x / 2^e), shaped like x; x ~ from_half_bits(bits, e).

    Relative error at most 2^-11 down to 2^-21 of the largest magnitude. Raises WeightError for NaN or infinity.
    """
    if not x.isfinite().all():
        raise WeightError("a tensor with NaN or infinity cannot be stored as float16")
    largest = float(x.abs().max()) if x.numel() else 0.0
    exponent = math.frexp(largest)[1] - TOP_EXPONENT if largest > 0 else 0
    half = (x.double() * 2.0**-exponent).to(torch.float16)
    return half.view(torch.int16), exponent


def from_half_bits(bits: Tensor, e: int) -> Tensor:
    """Return the float32 values, shaped like bits, of int16 bits made by `to_half_bits`."""
    largest = torch.finfo(torch.float32).max  # the last float32 values round up to 2^128
    return (bits.view(torch.float16).double() * 2.0**e).clamp(-largest, largest).float()

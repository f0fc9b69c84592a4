"""Keys and values as int8: x = scale * code, scale = max |x| / 127 over the channels of one head of one token.

Symmetric rounding to nearest, which needs no calibration and is right for keys and values alike.
"""

import torch
from torch import Tensor

LARGEST = 127


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes int8, scale float32 [..., 1]) of x [..., head_dim], nearest to codes * scale. NaN stays NaN."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / LARGEST
    codes = (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return codes.to(torch.int8), scale


def restored(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes [..., head_dim] times their scales [..., 1], in a dtype."""
    return (codes.float() * scale).to(dtype)

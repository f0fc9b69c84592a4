"""Every operator in plain torch, for any device: slow, but whole weights are never unpacked."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bwla_compiler.numerics.activations import fixed_point, quantize_activation
from bwla_compiler.numerics.kronecker import apply_kronecker
from bwla_compiler.numerics.nibbles import dequantized
from bwla_compiler.numerics.planes import unpack_signs
from bwla_compiler.spec import FLOAT_BITS

GROUP = 128
"""Columns that share one scale where there is more than one scale a row."""

CHUNK_ENTRIES = 1 << 20
"""Weights unpacked at a time: 1 MB of signs, 4 MB of floats."""


def transform(x: Tensor, scale: Tensor | None, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return (x * scale) (left (x) right), computed in float32, shaped and typed like x [..., n]."""
    y = x.float()
    if scale is not None:
        y = y * scale.float()
    # a result of its own even where nothing is asked: an operator's output may not alias its input
    return apply_kronecker(y, left, right).to(x.dtype, copy=y.data_ptr() == x.data_ptr())


@dataclass(frozen=True)
class Prologue:
    """What precedes the rounding of a fused group: norm or activation function, then a transform.

    kind: one of spec.PROLOGUES. eps: of a norm. gain, shift [n] of a norm or None; gate [tokens, n] of a "_mul".
    scale [n], left [n1, n1], right [n2, n2] of the transform or None, decoded.
    """

    kind: str = "none"
    eps: float = 0.0
    gain: Tensor | None = None
    shift: Tensor | None = None
    gate: Tensor | None = None
    scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def prologue(rows: Tensor, p: Prologue) -> Tensor:
    """Return rows [tokens, n] after the prologue, float32 throughout."""
    y = rows.float()
    if p.kind.endswith("_norm"):
        y = _normalized(y, p)
    elif p.kind != "none":
        y = ACTIVATIONS[p.kind.removesuffix("_mul")](y)
        if p.gate is not None:
            y = y * p.gate.float()
    if p.scale is not None:
        y = y * p.scale.float()
    return apply_kronecker(y, p.left, p.right)


def _normalized(y: Tensor, p: Prologue) -> Tensor:
    if p.kind == "layer_norm":
        y = F.layer_norm(y, y.shape[-1:], eps=p.eps)
    else:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + p.eps)
    if p.gain is not None:
        y = y * p.gain.float()
    return y if p.shift is None else y + p.shift.float()


def rounded(x: Tensor, column_scale: Tensor | None, bits: int) -> tuple[Tensor, Tensor | None]:
    """Return (codes [tokens, n] as float32, scale [tokens, 1] or None) of x [tokens, n].

    From 16 bits on x itself and None. The scale of a token that is not finite is NaN.
    """
    x = x.float() if column_scale is None else x.float() * column_scale.float()
    if bits >= FLOAT_BITS:
        return x, None
    return _healthy(x, *quantize_activation(x, bits=bits))


def _healthy(x: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes as float32 and scale, of tokens of x that are not finite 0 and NaN."""
    healthy = x.isfinite().all(-1, keepdim=True)
    return torch.where(healthy, codes, 0).float(), torch.where(healthy, scale, torch.nan)


def linear(
    q: Tensor,
    token_scale: Tensor | None,
    signs: Tensor,
    scale: Tensor,
    low_rank: tuple[Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
) -> Tensor:
    """Return y [tokens, out] float32 for codes q [tokens, in] float32.

    token_scale [tokens, 1] or None for 1; signs uint8 [planes, out, ceil(in / 8)]; scale [planes, out, groups];
    low_rank (in [rank, in], out [out, rank], scale [rank]); bias [out].
    """
    planes, out, _ = signs.shape
    columns = q.shape[-1]
    y = torch.empty(q.shape[0], out, dtype=torch.float32, device=q.device)
    step = max(1, CHUNK_ENTRIES // max(1, planes * columns))
    for first in range(0, out, step):
        rows = slice(first, first + step)
        y[:, rows] = _binary_product(q, unpack_signs(signs[:, rows], columns), scale[:, rows].float())
    if low_rank is not None:
        into, onto, rank_scale = low_rank
        y += ((q @ into.float().T) * rank_scale.float()) @ onto.float().T
    if token_scale is not None:
        y *= token_scale
    return y if bias is None else y + bias.float()


def _binary_product(q: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
    """Return sum_p (q B_p^T) scale_p [tokens, rows]; exact integer sums before row scales."""
    if scale.shape[2] == 1:
        return torch.stack([q @ signs[p].float().T * scale[p, :, 0] for p in range(signs.shape[0])]).sum(0)
    wide = scale.repeat_interleave(GROUP, dim=2)[..., : signs.shape[2]]
    return q @ (wide * signs).sum(0).T


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return (x codes^T) * scale + bias [tokens, out] float32; x [tokens, in], codes int8 [out, in], scale [out]."""
    out, columns = codes.shape
    x = x.float()
    y = torch.empty(x.shape[0], out, dtype=torch.float32, device=x.device)
    step = max(1, CHUNK_ENTRIES // max(1, columns))
    for first in range(0, out, step):
        rows = slice(first, first + step)
        y[:, rows] = x @ codes[rows].float().T * scale[rows].float()
    return y if bias is None else y + bias.float()


def int8_embedding(ids: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes[ids] * scale[ids] [..., width] of `dtype`; codes int8 [rows, width], scale [rows]."""
    rows = torch.embedding(codes, ids)  # refuses ids below 0, which an index would count from the end
    return (rows.float() * scale.float()[ids].unsqueeze(-1)).to(dtype)


def int4_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """Return x W^T + bias [tokens, out] float32, W = scale * codes by group, for x [tokens, in] rounded to 16 bits.

    codes uint8 [out, ceil(in / 2)], two a byte; scale [out, ceil(in / group_size)].
    """
    out, columns = codes.shape[0], x.shape[1]
    q, token_scale = _healthy(x, *fixed_point(x))
    y = torch.empty(x.shape[0], out, dtype=torch.float32, device=x.device)
    step = max(1, CHUNK_ENTRIES // max(1, columns))
    for first in range(0, out, step):
        rows = slice(first, first + step)
        y[:, rows] = q @ dequantized(codes[rows], scale[rows], columns=columns, group_size=group_size).T
    y *= token_scale
    return y if bias is None else y + bias.float()


def int4_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, width: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Return rows [..., width] of `dtype`; codes uint8 [rows, ceil(width / 2)], scale [rows, groups]."""
    return dequantized(torch.embedding(codes, ids), scale[ids], columns=width, group_size=group_size).to(dtype)

"""Float64 references of every operator, written to be read: they unpack whole weights, and serve tests and checks."""

import torch
from torch import Tensor

from bwla_compiler.numerics.activations import fixed_point, quantize_activation
from bwla_compiler.numerics.kronecker import apply_kronecker
from bwla_compiler.numerics.planes import unpack_signs
from bwla_compiler.runtime.portable import ACTIVATIONS, GROUP, Prologue
from bwla_compiler.spec import FLOAT_BITS


def transform(x: Tensor, scale: Tensor | None, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return (x * scale) (left (x) right) [..., n] float64."""
    y = x.double() if scale is None else x.double() * scale.double()
    return apply_kronecker(y, left, right)


def prologue(x: Tensor, p: Prologue) -> Tensor:
    """Return x [..., n] float64 after norm or activation function and transform."""
    y = x.double()
    if p.kind == "layer_norm":
        y = y - y.mean(-1, keepdim=True)
    if p.kind.endswith("_norm"):
        y = y / (y.square().mean(-1, keepdim=True) + p.eps).sqrt()
    elif p.kind != "none":
        y = ACTIVATIONS[p.kind.removesuffix("_mul")](y)
    y = y if p.gate is None else y * p.gate.double()
    y = y if p.gain is None else y * p.gain.double()
    y = y if p.shift is None else y + p.shift.double()
    return transform(y, p.scale, p.left, p.right)


def dense(
    signs: Tensor,
    scale: Tensor,
    in_features: int,
    *,
    low_rank: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Return sum_p scale_p B_p + low_rank_out diag(low_rank_scale) low_rank_in [out, in] float64."""
    wide = scale.double()
    if scale.shape[2] > 1:
        wide = wide.repeat_interleave(GROUP, 2)[..., :in_features]
    weight = (wide * unpack_signs(signs, in_features)).sum(0)
    if low_rank is not None:
        into, onto, rank_scale = low_rank
        weight = weight + (onto.double() * rank_scale.double()) @ into.double()
    return weight


def linear(
    x: Tensor,
    signs: Tensor,
    scale: Tensor,
    column_scale: Tensor | None,
    low_rank: tuple[Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
    activation_bits: int,
) -> Tensor:
    """Return y [..., out] float64 for x [..., in]; codes are rounded in float32, as the kernels do."""
    x = x.float() if column_scale is None else x.float() * column_scale
    q = x.double()
    if activation_bits < FLOAT_BITS:
        codes, token_scale = quantize_activation(x, bits=activation_bits)
        q = codes.double() * token_scale.double()
    y = q @ dense(signs, scale, x.shape[-1], low_rank=low_rank).T
    return y if bias is None else y + bias.double()


def experts(
    x: Tensor,
    chosen: Tensor,
    signs: Tensor,
    scale: Tensor,
    column_scale: Tensor | None,
    low_rank: tuple[Tensor, Tensor, Tensor] | None,
    activation_bits: int,
) -> Tensor:
    """Return y [*chosen.shape, out] float64: each row of x [N, in] by the experts chosen for it [N] or [N, k].

    The other tensors have a first axis of experts; an expert out of range gives zeros.
    """
    y = torch.zeros(*chosen.shape, signs.shape[2], dtype=torch.float64)
    for place in torch.cartesian_prod(*map(torch.arange, chosen.shape)).reshape(-1, chosen.dim()).tolist():
        expert = int(chosen[tuple(place)])
        if 0 <= expert < signs.shape[0]:
            columns = None if column_scale is None else column_scale[expert]
            into, onto, rank_scale = (t[expert] for t in low_rank) if low_rank else (None, None, None)
            pair = None if into is None or onto is None or rank_scale is None else (into, onto, rank_scale)
            row = linear(x[place[0]], signs[expert], scale[expert], columns, pair, None, activation_bits)
            y[tuple(place)] = row
    return y


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return (x codes^T) * scale + bias [..., out] float64."""
    y = x.double() @ codes.double().T * scale.double()
    return y if bias is None else y + bias.double()


def int8_embedding(ids: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes[ids] * scale[ids] [..., width], rounded to `dtype` once."""
    return (codes[ids].double() * scale[ids].double().unsqueeze(-1)).to(dtype)


def int4_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """Return x' W^T + bias [..., out] float64 with x' = x rounded to 16 bits a token, W of `int4_weight`."""
    q, token_scale = fixed_point(x)
    y = q.double() * token_scale.double() @ int4_weight(codes, scale, x.shape[-1], group_size).T
    return y if bias is None else y + bias.double()


def int4_weight(codes: Tensor, scale: Tensor, width: int, group_size: int) -> Tensor:
    """Return scale * codes [..., width] float64, group by group of packed codes uint8 [..., ceil(width / 2)]."""
    weight = torch.empty(*codes.shape[:-1], width, dtype=torch.float64)
    for column in range(width):
        code = (codes[..., column // 2].long() >> (4 * (column % 2))) % 16 - 8
        weight[..., column] = code * scale[..., column // group_size].double()
    return weight

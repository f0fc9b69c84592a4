"""What the operators ask of their tensors: shapes and dtypes that fit, scales decoded."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError
from bwla_compiler.runtime.compiled import Linear
from bwla_compiler.runtime.halves import decoded, whole_factor
from bwla_compiler.runtime.portable import GROUP, Prologue
from bwla_compiler.runtime.triton_layout import in_words, n_rows
from bwla_compiler.spec import FLOAT_BITS, PROLOGUES


def values(stored: Tensor, exponent: Tensor | None) -> Tensor:
    """Return the floats that a scale or factor stands for. Raises ShapeError for bits without exponent, or reverse."""
    if (stored.dtype == torch.int16) != (exponent is not None):
        raise ShapeError(
            f"a scale of {stored.dtype} with{'' if exponent is not None else 'out'} exponent: expected floats alone, "
            "or int16 bits of float16 with an int8 exponent"
        )
    return stored if exponent is None else decoded(stored, exponent)


def maybe_values(stored: Tensor | None, exponent: Tensor | None) -> Tensor | None:
    """Return `values`, None for none. Raises ShapeError for an exponent alone."""
    if stored is None:
        if exponent is not None:
            raise ShapeError("an exponent is given, and the scale it belongs to is not")
        return None
    return values(stored, exponent)


def is_square(factor: Tensor) -> bool:
    """Whether a factor of a transform is a matrix that it may be."""
    return factor.dim() == 2 and factor.shape[0] == factor.shape[1]


def transform_values(
    stored: Iterable[tuple[Tensor | None, Tensor | None]],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return scale, left and right of a transform as they act, of what is stored of them with their exponents."""
    scale, left, right = (maybe_values(*one) for one in stored)
    return scale, left, None if right is None else whole_factor(right)


def check_linear(x: Tensor, linear: Linear, bits: int) -> None:
    """Raise ShapeError where the tensors of a linear do not fit x or each other."""
    signs, scale, columns = linear.signs, linear.scale, x.shape[-1]
    _check_signs(signs, columns)
    planes, out = signs.shape[0], n_rows(signs)
    if scale.dim() != 3 or scale.shape[:2] != (planes, out) or scale.shape[2] not in (1, -(-columns // 128)):
        raise ShapeError(
            f"scale {list(scale.shape)}: expected [{planes}, {out}, 1] for rows, "
            f"or {-(-columns // GROUP)} scales a row for groups of {GROUP} columns"
        )
    if not (2 <= bits <= 8 or bits >= FLOAT_BITS):
        raise ShapeError(f"activation_bits is {bits}: expected 2 to 8, or {FLOAT_BITS} for floats")
    if linear.bias is not None and linear.bias.shape != (out,):
        raise ShapeError(f"bias {list(linear.bias.shape)}: expected [{out}]")
    if linear.low_rank is not None:
        into, onto, rank_scale = linear.low_rank
        rank = into.shape[0]
        shapes = ([*into.shape], [*onto.shape], [*rank_scale.shape])
        if shapes != ([rank, columns], [out, rank], [rank]):
            raise ShapeError(f"low-rank pair {shapes}: expected [rank, {columns}], [{out}, rank] and [rank]")
        if into.dtype != torch.int8 or onto.dtype != torch.int8:
            raise ShapeError(f"low-rank factors are {into.dtype} and {onto.dtype}: expected int8")


def _check_signs(signs: Tensor, columns: int) -> None:
    """Raise ShapeError for signs of neither layout."""
    if in_words(signs):
        fits, expected = signs.dim() == 4, f"[planes, {-(-columns // GROUP)}, out, 4]"
        fits = fits and (signs.shape[1], signs.shape[3]) == (-(-columns // GROUP), 4)
    else:
        n_bytes = (columns + 7) // 8
        fits, expected = signs.dtype == torch.uint8 and signs.dim() == 3, f"uint8 [planes, out, {n_bytes}]"
        fits = fits and signs.shape[2] == n_bytes
    if not fits:
        raise ShapeError(f"signs {signs.dtype} {list(signs.shape)} for {columns} input columns: expected {expected}")


def low_rank_pair(
    low_rank_in: Tensor | None, low_rank_out: Tensor | None, low_rank_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the low-rank tensors together, None for none. Raises ShapeError for some without the others."""
    if low_rank_in is None or low_rank_out is None or low_rank_scale is None:
        if low_rank_in is not None or low_rank_out is not None or low_rank_scale is not None:
            raise ShapeError("low_rank_in, low_rank_out and low_rank_scale are given together or not at all")
        return None
    return low_rank_in, low_rank_out, low_rank_scale


def linears_of(
    signs: Sequence[Tensor],
    scale: Sequence[Tensor],
    low_rank_in: Sequence[Tensor | None],
    low_rank_out: Sequence[Tensor | None],
    low_rank_scale: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    scale_exponent: Sequence[Tensor | None],
    low_rank_scale_exponent: Sequence[Tensor | None],
) -> list[Linear]:
    """Return one Linear per member. Raises ShapeError where the lists are not equally long."""
    parts = (signs, scale, low_rank_in, low_rank_out, low_rank_scale, bias, scale_exponent, low_rank_scale_exponent)
    lengths = [len(part) for part in parts]
    if len(set(lengths)) != 1:
        raise ShapeError(f"the lists of a group have {lengths} entries: one per member is needed, None for none")
    rank_scale = map(maybe_values, low_rank_scale, low_rank_scale_exponent)
    pairs = map(low_rank_pair, low_rank_in, low_rank_out, rank_scale)
    return [Linear(*one) for one in zip(signs, map(values, scale, scale_exponent), pairs, bias, strict=True)]


def check_prologue(x: Tensor, p: Prologue) -> None:
    """Raise ShapeError where a prologue is not known, or lacks what it needs, or does not fit x [..., n]."""
    n = x.shape[-1]
    if p.kind not in PROLOGUES:
        raise ShapeError(f"prologue {p.kind!r} is not known: expected one of {', '.join(PROLOGUES)}")
    if p.kind.endswith("_mul") != (p.gate is not None):
        raise ShapeError(f"prologue {p.kind!r} with{'out' if p.gate is None else ''} a gate: _mul takes one, no other")
    if p.gate is not None and p.gate.shape != x.shape:
        raise ShapeError(f"gate {list(p.gate.shape)}: expected {list(x.shape)}, as x")
    if not p.kind.endswith("_norm") and (p.gain is not None or p.shift is not None):
        raise ShapeError(f"prologue {p.kind!r} with gain or shift: norms alone take them")
    for name, values in (("gain", p.gain), ("shift", p.shift), ("transform_scale", p.scale)):
        if values is not None and values.shape != (n,):
            raise ShapeError(f"{name} {list(values.shape)}: expected [{n}]")
    sides = [1 if f is None else f.shape[0] for f in (p.left, p.right)]
    if any(f is not None and not is_square(f) for f in (p.left, p.right)):
        raise ShapeError("the factors of a transform must be square")
    if n % (sides[0] * sides[1]) or (p.left is not None and p.right is not None and sides[0] * sides[1] != n):
        raise ShapeError(f"factors of {sides[0]} and {sides[1]} channels for an input of {n}")


def check_residuals(x: Tensor, linears: Sequence[Linear], residuals: Sequence[Tensor | None]) -> None:
    """Raise ShapeError where there is not one residual (or None) per linear, shaped like its result."""
    if len(residuals) != len(linears):
        raise ShapeError(f"{len(residuals)} residuals for a group of {len(linears)}: one per member, None for none")
    for linear, residual in zip(linears, residuals, strict=True):
        if residual is not None and residual.shape != (*x.shape[:-1], n_rows(linear.signs)):
            raise ShapeError(
                f"residual {list(residual.shape)}: expected {[*x.shape[:-1], n_rows(linear.signs)]}, as its result"
            )

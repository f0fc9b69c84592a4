"""Operators by Triton kernels: packing into their layout, the choice of kernels and tiles, and launches.

Serves CUDA and HIP tensors; CPU tensors where BWLA_KERNELS=triton and Triton runs in its interpreter.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from bwla_compiler.codegen import triton_module
from bwla_compiler.codegen.triton_int4 import int4_tile
from bwla_compiler.codegen.triton_int8 import int8_tile
from bwla_compiler.codegen.triton_spec import (
    NO_TILE,
    Int4Kernel,
    Int8Kernel,
    Kind,
    LinearKernel,
    PrologueKernel,
    Tile,
    mixed_rows,
    padded,
)
from bwla_compiler.codegen.triton_tiles import is_decode
from bwla_compiler.errors import BuildError, ShapeError
from bwla_compiler.runtime.compiled import Linear
from bwla_compiler.runtime.portable import Prologue
from bwla_compiler.runtime.triton_launch import (
    has_dp4a,
    int4_linear_of,
    int8_linear_of,
    launch,
    linear_dot_of,
    linear_gemv_of,
    linear_sum_of,
    low_rank_of,
    precision_of,
    prologue_of,
)
from bwla_compiler.runtime.triton_layout import float32, n_rows, packed_scale, packed_signs
from bwla_compiler.runtime.triton_tuner import tile_for
from bwla_compiler.settings import chosen_kernels
from bwla_compiler.spec import FLOAT_BITS, TransformSpec

_TOO_LARGE: set[PrologueKernel] = set()
"""Kernels that a device of this process could not hold: devices differ in shared memory, and only a launch tells."""


@dataclass(frozen=True)
class _Codes:
    """Tokens as the linear kernels read them; token_scale and code_sum are None for floats.

    mixed: the low-rank pairs' first half [1, tokens, sum of ranks] where it was computed beside the rounding.
    """

    values: Tensor
    token_scale: Tensor | None
    code_sum: Tensor | None
    mixed: Tensor | None = None


Pair = tuple[Tensor, Tensor, Tensor]
"""A low-rank pair: low_rank_in [rank, in] int8, low_rank_out [out, rank] int8, low_rank_scale [rank]."""


@functools.cache
def warn_slow(reason: str) -> None:
    """Warn, once for each reason, that plain torch computes where kernels should."""
    warnings.warn(f"{reason}. Until then plain torch computes, many times slower", RuntimeWarning, stacklevel=3)


def serves(x: Tensor) -> bool:
    """Return whether Triton computes operators of x, which has entries.

    Raises BuildError where BWLA_KERNELS=triton asks for what cannot be, SettingsError where it is not known.
    """
    chosen = chosen_kernels()
    if chosen in ("cpp", "torch") or (chosen == "auto" and not x.is_cuda) or x.numel() == 0 or x.is_meta:
        return False
    if chosen == "auto":
        if not triton_module.installed():
            warn_slow(f"Triton, which quantized linears need on a GPU, is not installed; {triton_module.REMEDY}")
        return triton_module.installed()
    if not x.is_cuda and not triton_module.interpreted():
        raise BuildError(
            f"BWLA_KERNELS=triton and a tensor on {x.device}: Triton runs there only in its interpreter; set "
            "TRITON_INTERPRET=1 before Python starts, move the model to a GPU, or unset BWLA_KERNELS"
        )
    return True


# ---------------------------------------------------------------- operators


def linears(x: Tensor, linears: Sequence[Linear], column_scale: Tensor | None, bits: int) -> list[Tensor]:
    """Return one y [tokens, out], dtype of x, per linear, for x [tokens, in] that they share; x is rounded once."""
    return fused(x, Prologue(), linears, [None] * len(linears), column_scale, bits)


def transform(rows: Tensor, scale: Tensor | None, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return (rows * scale) (left (x) right) [tokens, n], dtype of rows. Raises ShapeError."""
    steps = Prologue(scale=scale, left=left, right=right)
    return _floats(rows.contiguous(), steps, None, stride=rows.shape[1], dtype=rows.dtype)


def fused(
    rows: Tensor,
    prologue: Prologue,
    linears: Sequence[Linear],
    residuals: Sequence[Tensor | None],
    column_scale: Tensor | None,
    bits: int,
) -> list[Tensor]:
    """Return y_i [tokens, out_i], dtype of rows: linears of the rounded prologue, with bias and residual added.

    rows [tokens, in]; residuals [tokens, out_i] or None, one per linear. Raises ShapeError for factors or a gate
    that do not fit.
    """
    rows = rows.contiguous()
    if bits < FLOAT_BITS:
        codes = _rounded(rows, prologue, column_scale, bits, _pairs_beside(rows, prologue, linears))
    else:
        codes = _unrounded(rows, prologue, column_scale)
    results: dict[int, Tensor] = {}
    for alike in _alike(linears):
        members = [linears[i] for i in alike]
        ys = _members(rows, codes, members, [residuals[i] for i in alike], bits)
        results.update(zip(alike, ys, strict=True))
    return [results[i] for i in range(len(linears))]


def _alike(linears: Sequence[Linear]) -> list[list[int]]:
    """Return the indices of linears that one launch can serve: as many planes, and the same kind of scale."""
    found: dict[tuple[int, bool], list[int]] = {}
    for i, linear in enumerate(linears):
        found.setdefault((linear.signs.shape[0], linear.scale.shape[2] > 1), []).append(i)
    return list(found.values())


# ---------------------------------------------------------------- before the linears


def _pairs_beside(rows: Tensor, prologue: Prologue, linears: Sequence[Linear]) -> list[Pair]:
    """Return the low-rank pairs whose first half is computed beside the rounding: where tokens are few, one launch."""
    turned = prologue.left is not None or prologue.right is not None
    if not mixed_rows(rows.shape[1], rows.shape[0], turned=turned) or len(_alike(linears)) > 1:
        return []
    return [linear.low_rank for linear in linears if linear.low_rank is not None]


def _kernel(rows: Tensor, prologue: Prologue, column_scale: Tensor | None, *, bits: int, stride: int) -> PrologueKernel:
    """Return the spec of the kernel that does all of a prologue. Raises ShapeError where its tensors do not fit."""
    return PrologueKernel(
        columns=rows.shape[1],
        kind=_kind(prologue.kind),
        transform=_basis(rows.shape[1], prologue),
        column_scaled=column_scale is not None,
        gain=prologue.gain is not None,
        shift=prologue.shift is not None,
        activation_bits=bits,
        stride=stride,
        precision=precision_of(rows, prologue.left, prologue.right),
    )


def _kind(name: str) -> Kind:
    """Return the kind of prologue. Raises ShapeError for one that is not known."""
    if name not in get_args(Kind):
        raise ShapeError(f"prologue {name!r} is not known: expected one of {', '.join(get_args(Kind))}")
    return cast(Kind, name)


def _basis(columns: int, prologue: Prologue) -> TransformSpec:
    left, right = prologue.left, prologue.right
    for name, factor in (("left", left), ("right", right)):
        if factor is not None and (factor.dim() != 2 or factor.shape[0] != factor.shape[1]):
            raise ShapeError(f"{name} factor has shape {list(factor.shape)}: it must be square")
    n2 = right.shape[0] if right is not None else columns // max(1, left.shape[0]) if left is not None else columns
    n1 = left.shape[0] if left is not None else columns // max(1, n2)
    if n1 * n2 != columns:
        raise ShapeError(f"factors of {n1} and {n2} channels do not multiply to the {columns} channels of the input")
    scaled = prologue.scale is not None
    return TransformSpec("kronecker", n1, n2, left is not None, right is not None, scaled)


def _rounded(
    rows: Tensor, prologue: Prologue, column_scale: Tensor | None, bits: int, pairs: Sequence[Pair] = ()
) -> _Codes:
    """Return the codes of the prologue's result, and the first half of the low-rank pairs."""
    spec, tokens = _kernel(rows, prologue, column_scale, bits=bits, stride=0), rows.shape[0]
    values = rows.new_empty(tokens, spec.row_stride, dtype=torch.int8)
    scale, total = rows.new_empty(tokens, dtype=torch.float32), rows.new_empty(tokens, dtype=torch.int32)
    results = {"out": values, "token_scale": scale, "code_sum": total}
    inputs = _inputs(rows, prologue, column_scale)
    mixed = None
    if pairs:
        ranks = tuple(pair[0].shape[0] for pair in pairs)
        spec = replace(spec, ranks=ranks, mixed_rows=mixed_rows(spec.columns, tokens, turned=spec.online))
        results["mixed"] = mixed = rows.new_empty(1, tokens, sum(ranks), dtype=torch.float32)
        inputs |= {f"low_rank_in_{i}": pair[0].contiguous() for i, pair in enumerate(pairs)}
        inputs |= {f"low_rank_scale_{i}": float32(pair[2]) for i, pair in enumerate(pairs)}
    _run(spec, inputs, results)
    return _Codes(values, scale, total, mixed)


def _unrounded(rows: Tensor, prologue: Prologue, column_scale: Tensor | None) -> _Codes:
    """Return the prologue's result as floats."""
    stride = padded(rows.shape[1])
    return _Codes(_floats(rows, prologue, column_scale, stride=stride, dtype=torch.float32), None, None)


def _floats(
    rows: Tensor, prologue: Prologue, column_scale: Tensor | None, *, stride: int, dtype: torch.dtype
) -> Tensor:
    """Return x'' * column_scale [tokens, stride] of `dtype`, columns beyond n zero."""
    spec = _kernel(rows, prologue, column_scale, bits=FLOAT_BITS, stride=stride)
    out = rows.new_empty(rows.shape[0], stride, dtype=dtype)
    _run(spec, _inputs(rows, prologue, column_scale), {"out": out})
    return out


def _run(spec: PrologueKernel, inputs: Mapping[str, Any], results: Mapping[str, Tensor]) -> None:
    """Launch a prologue: one program a token, or, where a device cannot hold that, a kernel for each of its stages.

    Raises ShapeError for rows longer than the kernels take, and Triton's OutOfResources where there are no stages.
    """
    if spec.fits and not spec.online:
        launch(prologue_of(spec), (inputs["x"].shape[0], spec.programs), {**inputs, **results})
        return
    if spec.fits and spec not in _TOO_LARGE and _attempt(spec, {**inputs, **results}):
        return
    if not spec.stages[-1].fits:
        raise ShapeError(f"a row of {spec.columns} channels is longer than the kernels take: 32768 at most")
    x = inputs["x"]
    for stage in spec.stages[:-1]:
        out = x.new_empty(x.shape, dtype=torch.float32)
        launch(prologue_of(stage), (x.shape[0], stage.programs), {**inputs, "x": x, "out": out})
        x = out
    launch(prologue_of(spec.stages[-1]), (x.shape[0], spec.programs), {**inputs, **results, "x": x})


def _attempt(spec: PrologueKernel, tensors: Mapping[str, Any]) -> bool:
    """Launch one program a token; return whether the device holds what it needs, which is remembered."""
    from triton.runtime.errors import OutOfResources

    try:
        launch(prologue_of(spec), (tensors["x"].shape[0], spec.programs), tensors)
    except OutOfResources:
        _TOO_LARGE.add(spec)
        return False
    return True


def _inputs(rows: Tensor, prologue: Prologue, column_scale: Tensor | None) -> dict[str, Any]:
    """Return the tensors of a prologue by parameter name. Raises ShapeError for a gate of another shape."""
    gate = prologue.gate
    if gate is not None:
        if gate.numel() != rows.numel():
            raise ShapeError(f"gate {list(gate.shape)}: expected the shape of the input, {list(rows.shape)}")
        gate = gate.contiguous()
    named = {name: getattr(prologue, name) for name in ("gain", "shift", "scale", "left", "right")}
    for name in ("gain", "shift", "scale"):
        if named[name] is not None and named[name].shape != rows.shape[1:]:
            raise ShapeError(f"{name} {list(named[name].shape)}: expected [{rows.shape[1]}]")
    vectors = {name: None if value is None else value.contiguous() for name, value in named.items()}
    columns = None if column_scale is None else column_scale.contiguous()
    return {"x": rows, "gate": gate, **vectors, "column_scale": columns, "eps": prologue.eps}


# ---------------------------------------------------------------- the linears


def _members(
    rows: Tensor, codes: _Codes, members: Sequence[Linear], residuals: Sequence[Tensor | None], bits: int
) -> list[Tensor]:
    """Return y of members that one launch serves."""
    residuals = _alike_floats(residuals)
    ys = [rows.new_empty(rows.shape[0], n_rows(m.signs)) for m in members]
    spec = replace(_spec(rows, members, residuals, bits), mixed_before=codes.mixed is not None)
    tensors: dict[str, Any] = {"codes": codes.values, "token_scale": codes.token_scale, "code_sum": codes.code_sum}
    tensors |= {"tokens": rows.shape[0], "mixed": codes.mixed}
    for i, (member, residual) in enumerate(zip(members, residuals, strict=True)):
        own = _member_tensors(member, residual, ys[i], columns=spec.columns)
        tensors |= {f"{name}_{i}": tensor for name, tensor in own.items()}
    run = functools.partial(_run_linears, spec, tensors)
    run(tile_for(spec, rows.shape[0], rows, run))
    return ys


def _run_linears(spec: LinearKernel, tensors: dict[str, Any], tile: Tile) -> None:
    """Launch the kernels of linears that share their codes, with a tile."""
    spec, tokens, codes = replace(spec, tile=tile), tensors["tokens"], tensors["codes"]
    if spec.ranked and not spec.mixed_before:
        tensors = {**tensors, "mixed": _low_rank(spec, tensors)}
    grid = spec.first_tiles(spec.out_features, tile.rows)[-1], -(-tokens // tile.tokens)
    if is_decode(spec, tokens) and tile.tokens == 1:
        launch(linear_gemv_of(spec), grid, tensors)
    elif tile.parts == 1:
        launch(linear_dot_of(spec), grid, tensors)
    else:
        floats = spec.grouped or not spec.rounds
        sums = (tile.parts, 1 if spec.grouped else spec.planes, tokens, sum(spec.out_features))
        partial = codes.new_empty(sums, dtype=torch.float32 if floats else torch.int32)
        launch(linear_dot_of(spec), (*grid, tile.parts), {**tensors, "partial": partial})
        own = spec.sum_tile
        grid = spec.first_tiles(spec.out_features, own.rows)[-1], -(-tokens // own.tokens)
        launch(linear_sum_of(spec), grid, {**tensors, "partial": partial})


def _alike_floats(residuals: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return residuals of one dtype, since a launch has one: float32 where they differ."""
    if len({r.dtype for r in residuals if r is not None}) < 2:
        return list(residuals)
    return [None if r is None else r.float() for r in residuals]


def _spec(rows: Tensor, members: Sequence[Linear], residuals: Sequence[Tensor | None], bits: int) -> LinearKernel:
    """Return the spec of a launch for these tensors, its tile still open."""
    return LinearKernel(
        columns=rows.shape[1],
        out_features=tuple(n_rows(m.signs) for m in members),
        planes=members[0].signs.shape[0],
        grouped=members[0].scale.shape[2] > 1,
        ranks=tuple(0 if m.low_rank is None else m.low_rank[0].shape[0] for m in members),
        biases=tuple(m.bias is not None for m in members),
        residuals=tuple(r is not None for r in residuals),
        activation_bits=bits,
        tile=NO_TILE,
        precision=precision_of(rows),
        assembly=rows.is_cuda and has_dp4a(rows) and not triton_module.interpreted(),
        decodes=has_dp4a(rows),
    )


def _member_tensors(member: Linear, residual: Tensor | None, y: Tensor, *, columns: int) -> dict[str, Tensor | None]:
    """Return a member's tensors by the first part of their parameter names."""
    pair = member.low_rank
    return {
        "words": packed_signs(member.signs, columns),
        "scale": packed_scale(member.scale),
        "low_rank_in": None if pair is None else pair[0].contiguous(),
        "low_rank_out": None if pair is None else pair[1].contiguous(),
        "low_rank_scale": None if pair is None else float32(pair[2]),
        "bias": None if member.bias is None else float32(member.bias),
        "residual": None if residual is None else residual.reshape(y.shape).contiguous(),
        "y": y,
    }


def _low_rank(spec: LinearKernel, tensors: Mapping[str, Any]) -> Tensor:
    """Return t [parts, tokens, sum of ranks] float32 of members with a low-rank pair."""
    tokens, tile = tensors["tokens"], spec.rank_tile
    mixed: Tensor = tensors["codes"].new_empty(tile.parts, tokens, sum(spec.ranks), dtype=torch.float32)
    own: dict[str, Any] = {"codes": tensors["codes"], "mixed": mixed, "tokens": tokens}
    for i, member in enumerate(i for i, rank in enumerate(spec.ranks) if rank):
        own |= {f"{name}_{i}": tensors[f"{name}_{member}"] for name in ("low_rank_in", "low_rank_scale")}
    tiles = spec.first_tiles([r for r in spec.ranks if r], tile.rows)[-1]
    launch(low_rank_of(spec), (tiles, -(-tokens // tile.tokens), tile.parts), own)
    return mixed


# ---------------------------------------------------------------- heads


def int8_linear(rows: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return (rows codes^T) * scale + bias [tokens, out], dtype of rows; rows [tokens, in], codes int8 [out, in]."""
    rows, tokens, out = rows.contiguous(), rows.shape[0], codes.shape[0]
    tile = int8_tile(tokens)
    spec = Int8Kernel(rows.shape[1], out, bias is not None, tile, precision_of(rows))
    y = rows.new_empty(tokens, out)
    tensors = {"x": rows, "codes": codes.contiguous(), "scale": float32(scale), "y": y, "tokens": tokens}
    tensors |= {"bias": None if bias is None else float32(bias)}
    launch(int8_linear_of(spec), (-(-out // tile.rows), -(-tokens // tile.tokens)), tensors)
    return y


def int4_linear(rows: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """Return rows W^T + bias [tokens, out], dtype of rows; codes uint8 [out, ceil(in / 2)], scale [out, groups]."""
    rows, tokens, out = rows.contiguous(), rows.shape[0], codes.shape[0]
    tile = int4_tile(tokens)
    spec = Int4Kernel(rows.shape[1], out, group_size, bias is not None, tile, precision_of(rows))
    y = rows.new_empty(tokens, out)
    tensors = {"x": rows, "codes": codes.contiguous(), "scale": float32(scale), "y": y, "tokens": tokens}
    tensors |= {"bias": None if bias is None else float32(bias)}
    launch(int4_linear_of(spec), (-(-out // tile.rows), -(-tokens // tile.tokens)), tensors)
    return y

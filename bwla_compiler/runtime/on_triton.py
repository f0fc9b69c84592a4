"""Operators by Triton kernels: packing into their layout, the choice of kernels and tiles, and launches.

Serves CUDA and HIP tensors; CPU tensors where BWLA_KERNELS=triton and Triton runs in its interpreter.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor

from bwla_compiler.codegen import triton_module
from bwla_compiler.codegen.triton_gemv import emit_linear_gemv
from bwla_compiler.codegen.triton_linear import emit_linear_dot, emit_low_rank
from bwla_compiler.codegen.triton_prologue import emit_prologue
from bwla_compiler.codegen.triton_spec import (
    GEMV_TOKENS,
    Emitted,
    Kind,
    LinearKernel,
    Precision,
    PrologueKernel,
    dot_tile,
    gemv_tile,
    padded,
)
from bwla_compiler.errors import BuildError, ShapeError
from bwla_compiler.numerics.kronecker import apply_kronecker
from bwla_compiler.runtime.compiled import Linear
from bwla_compiler.runtime.portable import Prologue
from bwla_compiler.runtime.triton_layout import exact_in_tf32, float32, packed_scale, packed_signs
from bwla_compiler.settings import chosen_kernels
from bwla_compiler.spec import FLOAT_BITS, TransformSpec

_TOO_LARGE: set[PrologueKernel] = set()
"""Kernels that a device of this process could not hold: devices differ in shared memory, and only a launch tells."""


@dataclass(frozen=True)
class _Codes:
    """Tokens as the linear kernels read them; token_scale and code_sum are None for floats."""

    values: Tensor
    token_scale: Tensor | None
    code_sum: Tensor | None


def serves(x: Tensor) -> bool:
    """Return whether Triton computes operators of x, which has entries.

    Raises BuildError where BWLA_KERNELS=triton asks for what cannot be, SettingsError where it is not known.
    """
    chosen = chosen_kernels()
    if chosen in ("cpp", "torch") or (chosen == "auto" and not x.is_cuda) or x.numel() == 0 or x.is_meta:
        return False
    if chosen == "auto":
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
        codes = _rounded(rows, prologue, column_scale, bits)
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
        precision=_precision(rows, prologue.left, prologue.right),
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


def _rounded(rows: Tensor, prologue: Prologue, column_scale: Tensor | None, bits: int) -> _Codes:
    """Return the codes of the prologue's result."""
    spec = _kernel(rows, prologue, column_scale, bits=bits, stride=0)
    tokens = rows.shape[0]
    values = rows.new_empty(tokens, spec.row_stride, dtype=torch.int8)
    scale, total = rows.new_empty(tokens, dtype=torch.float32), rows.new_empty(tokens, dtype=torch.int32)
    results = {"out": values, "token_scale": scale, "code_sum": total}
    if not _run(spec, {**_inputs(rows, prologue, column_scale), **results}):
        floats = _by_torch(rows, prologue, column_scale, stride=spec.columns, dtype=torch.float32)
        return _rounded(floats, Prologue(), None, bits)
    return _Codes(values, scale, total)


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
    if not _run(spec, {**_inputs(rows, prologue, column_scale), "out": out}):
        return _by_torch(rows, prologue, column_scale, stride=stride, dtype=dtype)
    return out


def _run(spec: PrologueKernel, tensors: Mapping[str, Any]) -> bool:
    """Launch a prologue's kernel, one program a token; return whether the device holds what a program needs."""
    from triton.runtime.errors import OutOfResources

    if not spec.fits or spec in _TOO_LARGE:
        return False
    try:
        _launch(emit_prologue_of(spec), (tensors["x"].shape[0],), tensors)
    except OutOfResources:
        _TOO_LARGE.add(spec)
        return False
    return True


def _by_torch(
    rows: Tensor, prologue: Prologue, column_scale: Tensor | None, *, stride: int, dtype: torch.dtype
) -> Tensor:
    """Return what `_floats` does for factors too large for one program: their products are torch's."""
    if prologue.left is None and prologue.right is None:
        raise ShapeError(f"a row of {rows.shape[1]} channels is longer than the kernels take: 32768 at most")
    first = Prologue(prologue.kind, prologue.eps, prologue.gain, prologue.shift, prologue.gate, prologue.scale)
    before = _floats(rows, first, None, stride=rows.shape[1], dtype=torch.float32)
    after = apply_kronecker(before, prologue.left, prologue.right)
    return _floats(after, Prologue(), column_scale, stride=stride, dtype=dtype)


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
    tokens = rows.shape[0]
    residuals = _alike_floats(residuals)
    ys = [rows.new_empty(tokens, m.signs.shape[1]) for m in members]
    spec, gemv = _spec(rows, members, residuals, bits)
    tensors: dict[str, Any] = {"codes": codes.values.view(torch.int32) if gemv else codes.values}
    tensors |= {"token_scale": codes.token_scale, "code_sum": codes.code_sum, "tokens": tokens}
    if spec.ranked:
        tensors["mixed"] = _low_rank(spec, codes, members, tokens)
    for i, (member, residual) in enumerate(zip(members, residuals, strict=True)):
        own = _member_tensors(member, residual, ys[i], columns=spec.columns)
        tensors |= {f"{name}_{i}": tensor for name, tensor in own.items()}
    tiles = spec.first_tiles(spec.out_features, spec.tile.rows)[-1]
    emitted = emit_linear_gemv_of(spec) if gemv else emit_linear_dot_of(spec)
    _launch(emitted, (tiles, -(-tokens // spec.tile.tokens)), tensors)
    return ys


def _alike_floats(residuals: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return residuals of one dtype, since a launch has one: float32 where they differ."""
    if len({r.dtype for r in residuals if r is not None}) < 2:
        return list(residuals)
    return [None if r is None else r.float() for r in residuals]


def _spec(
    rows: Tensor, members: Sequence[Linear], residuals: Sequence[Tensor | None], bits: int
) -> tuple[LinearKernel, bool]:
    """Return the spec of a launch for these tensors, and whether it is the decode kernel."""
    planes, grouped = members[0].signs.shape[0], members[0].scale.shape[2] > 1
    rounds = bits < FLOAT_BITS
    gemv = rows.shape[0] <= GEMV_TOKENS and rounds and _has_dp4a(rows)
    tile = gemv_tile(rows.shape[1]) if gemv else dot_tile(rows.shape[0], planes=planes, grouped=grouped, rounds=rounds)
    spec = LinearKernel(
        columns=rows.shape[1],
        out_features=tuple(m.signs.shape[1] for m in members),
        planes=planes,
        grouped=grouped,
        ranks=tuple(0 if m.low_rank is None else m.low_rank[0].shape[0] for m in members),
        biases=tuple(m.bias is not None for m in members),
        residuals=tuple(r is not None for r in residuals),
        activation_bits=bits,
        tile=tile,
        precision=_precision(rows),
        assembly=rows.is_cuda and not triton_module.interpreted(),
    )
    return spec, gemv


def _member_tensors(member: Linear, residual: Tensor | None, y: Tensor, *, columns: int) -> dict[str, Tensor | None]:
    """Return a member's tensors by the first part of their parameter names."""
    onto = None if member.low_rank is None else member.low_rank[1].contiguous()
    return {
        "words": packed_signs(member.signs, columns),
        "scale": packed_scale(member.scale),
        "low_rank_out": onto,
        "bias": None if member.bias is None else float32(member.bias),
        "residual": None if residual is None else residual.reshape(y.shape).contiguous(),
        "y": y,
    }


def _low_rank(spec: LinearKernel, codes: _Codes, members: Sequence[Linear], tokens: int) -> Tensor:
    """Return t [tokens, sum of ranks] float32 of members with a low-rank pair."""
    pairs = [m.low_rank for m in members if m.low_rank is not None]
    mixed = codes.values.new_empty(tokens, sum(spec.ranks), dtype=torch.float32)
    tensors: dict[str, Any] = {"codes": codes.values, "mixed": mixed, "tokens": tokens}
    for i, (into, _, scale) in enumerate(pairs):
        tensors |= {f"low_rank_in_{i}": into.contiguous(), f"low_rank_scale_{i}": float32(scale)}
    tile = spec.rank_tile
    tiles = spec.first_tiles([r for r in spec.ranks if r], tile.rows)[-1]
    _launch(emit_low_rank_of(spec), (tiles, -(-tokens // tile.tokens)), tensors)
    return mixed


# ---------------------------------------------------------------- launches


emit_prologue_of = functools.cache(emit_prologue)
emit_linear_dot_of = functools.cache(emit_linear_dot)
emit_linear_gemv_of = functools.cache(emit_linear_gemv)
emit_low_rank_of = functools.cache(emit_low_rank)
function_of = functools.cache(triton_module.load)


def _launch(emitted: Emitted, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Run a kernel on the arguments that it names, on the device of its tensors."""
    own = {name: arguments[name] for name, _ in emitted.parameters}
    first = next(value for value in own.values() if isinstance(value, Tensor))
    with torch.cuda.device_of(first):
        function_of(emitted)[grid](**own, **emitted.options)


def _precision(x: Tensor, *factors: Tensor | None) -> Precision:
    """Return how float products with these factors run, on matrix units where there are any for it."""
    if not x.is_cuda or torch.version.hip is not None:
        return "ieee"
    return "tf32x2" if all(exact_in_tf32(f) for f in factors if f is not None) else "tf32x3"


def _has_dp4a(x: Tensor) -> bool:
    """Return whether the decode kernel serves x's device: CUDA, and the interpreter, which stands in for it."""
    return torch.version.hip is None or not x.is_cuda

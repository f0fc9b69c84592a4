"""The operators bwla::*: schema, shapes, implementations, and the refusal of gradients.

x is float32, bfloat16 or float16 with any leading dimensions; arithmetic is float32; results have the dtype of x.
Scales and factors are floats, or int16 bits of float16 with their power of two as the argument NAME_exponent (int8,
one element), which the operators decode. The first call on the CPU builds the C++ operators (`native`), which then
take the place of the Python implementations here, for that call too: they add in another order, so that a process
whose first call was Python's would not repeat the bits of one that was already running.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bwla_compiler.errors import GradientError, ShapeError
from bwla_compiler.runtime import (
    anchors,
    attention,
    cached_attention,
    compiled,
    end_ops,
    native,
    on_triton,
    portable,
    programs,
    routines,
)
from bwla_compiler.runtime.checks import (
    check_linear,
    check_prologue,
    check_residuals,
    linears_of,
    low_rank_pair,
    maybe_values,
    transform_values,
    values,
)
from bwla_compiler.runtime.compiled import Linear
from bwla_compiler.runtime.expert_products import Experts, check_experts, expert_products
from bwla_compiler.runtime.rows import empty_result, rows_of, shaped_like
from bwla_compiler.runtime.triton_layout import bytes_of, in_words, n_rows
from bwla_compiler.spec import ROUTINE_RESULTS

LIBRARY = torch.library.Library("bwla", "DEF")

SCHEMAS = (
    "transform(Tensor x, Tensor? scale, Tensor? left, Tensor? right, Tensor? scale_exponent=None, "
    "Tensor? left_exponent=None, Tensor? right_exponent=None) -> Tensor",
    "linear(Tensor x, Tensor signs, Tensor scale, Tensor? column_scale, Tensor? low_rank_in, Tensor? low_rank_out, "
    "Tensor? low_rank_scale, Tensor? bias, int activation_bits, Tensor? scale_exponent=None, "
    "Tensor? column_scale_exponent=None, Tensor? low_rank_scale_exponent=None) -> Tensor",
    "linear_group(Tensor x, Tensor[] signs, Tensor[] scale, Tensor? column_scale, Tensor?[] low_rank_in, "
    "Tensor?[] low_rank_out, Tensor?[] low_rank_scale, Tensor?[] bias, int activation_bits, "
    "Tensor?[] scale_exponent, Tensor? column_scale_exponent, Tensor?[] low_rank_scale_exponent) -> Tensor[]",
    "fused_group(Tensor x, Tensor? gate, str prologue, float eps, Tensor? gain, Tensor? shift, "
    "Tensor? transform_scale, Tensor? left, Tensor? right, Tensor? transform_scale_exponent, Tensor? left_exponent, "
    "Tensor? right_exponent, Tensor[] signs, Tensor[] scale, Tensor? column_scale, Tensor?[] low_rank_in, "
    "Tensor?[] low_rank_out, Tensor?[] low_rank_scale, Tensor?[] bias, Tensor?[] residual, int activation_bits, "
    "Tensor?[] scale_exponent, Tensor? column_scale_exponent, Tensor?[] low_rank_scale_exponent) -> Tensor[]",
    "linear_of(Tensor x, Tensor anchor, str facts, int activation_bits) -> Tensor",
    "transform_of(Tensor x, Tensor anchor, str facts) -> Tensor",
    "prologue_of(Tensor x, Tensor anchor, str facts, str kind, float eps) -> Tensor",
    "part(Tensor anchor, str name, str facts) -> Tensor",
    "prologue(Tensor x, str kind, float eps, Tensor? gain, Tensor? shift) -> Tensor",
    "sin(Tensor x) -> Tensor",
    "cos(Tensor x) -> Tensor",
    *(
        f"routine{n}(Tensor[] inputs, Tensor(a!)[] caches, str text) -> ({', '.join(['Tensor'] * n)})"
        for n in ROUTINE_RESULTS
    ),
    "experts(Tensor x, Tensor experts, Tensor signs, Tensor scale, Tensor? column_scale, Tensor? low_rank_in, "
    "Tensor? low_rank_out, Tensor? low_rank_scale, int activation_bits, Tensor? scale_exponent=None, "
    "Tensor? column_scale_exponent=None, Tensor? low_rank_scale_exponent=None) -> Tensor",
    "int8_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? scale_exponent=None) -> Tensor",
    "int8_embedding(Tensor ids, Tensor codes, Tensor scale, ScalarType dtype, Tensor? scale_exponent=None) -> Tensor",
    "int4_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int group_size, Tensor? scale_exponent=None) "
    "-> Tensor",
    "int4_embedding(Tensor ids, Tensor codes, Tensor scale, int width, int group_size, ScalarType dtype, "
    "Tensor? scale_exponent=None) -> Tensor",
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal=False, "
    "Tensor? key_scale=None, Tensor? value_scale=None) -> Tensor",
    "cached_attention(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor start, Tensor? mask, float scale, Tensor(c!)? key_scale=None, "
    "Tensor(d!)? value_scale=None, Tensor? scale_start=None) -> Tensor",
    "refuse_gradient(Tensor gradient, SymInt[] shape) -> Tensor",
)
for _schema in SCHEMAS:
    LIBRARY.define(_schema)


# ---------------------------------------------------------------- implementations


def _linears(x: Tensor, linears: list[Linear], column_scale: Tensor | None, bits: int, *, fast: bool) -> list[Tensor]:
    """Return one result per linear; by compiled kernels where `fast` and there are any."""
    for linear in linears:
        check_linear(x, linear, bits)
    if column_scale is not None and column_scale.shape != x.shape[-1:]:
        raise ShapeError(f"column_scale {list(column_scale.shape)}: expected [{x.shape[-1]}]")
    rows = rows_of(x)
    library = compiled.kernels() if fast and native.wanted() else None
    if on_triton.serves(rows):
        results = on_triton.linears(rows, linears, column_scale, bits)
    elif library is not None:
        results = compiled.linears(library, rows, linears, column_scale, bits)
    else:
        q, token_scale = portable.rounded(rows, column_scale, bits)
        signs = [bytes_of(m.signs, x.shape[-1]) if in_words(m.signs) else m.signs for m in linears]
        members = zip(signs, linears, strict=True)
        results = [portable.linear(q, token_scale, s, m.scale, m.low_rank, m.bias) for s, m in members]
    return [shaped_like(y, x) for y in results]


def _linear_with(fast: bool) -> Any:
    """Return the implementation of bwla::linear."""

    def linear(
        x: Tensor, signs: Tensor, scale: Tensor, column_scale: Tensor | None, low_rank_in: Tensor | None,
        low_rank_out: Tensor | None, low_rank_scale: Tensor | None, bias: Tensor | None, activation_bits: int,
        scale_exponent: Tensor | None = None, column_scale_exponent: Tensor | None = None,
        low_rank_scale_exponent: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        rank_scale = maybe_values(low_rank_scale, low_rank_scale_exponent)
        pair = low_rank_pair(low_rank_in, low_rank_out, rank_scale)
        member = Linear(signs, values(scale, scale_exponent), pair, bias)
        columns = maybe_values(column_scale, column_scale_exponent)
        return _linears(x, [member], columns, activation_bits, fast=fast)[0]

    return linear


def _group_with(fast: bool) -> Any:
    """Return the implementation of bwla::linear_group."""

    def linear_group(
        x: Tensor, signs: list[Tensor], scale: list[Tensor], column_scale: Tensor | None,
        low_rank_in: list[Tensor | None], low_rank_out: list[Tensor | None], low_rank_scale: list[Tensor | None],
        bias: list[Tensor | None], activation_bits: int, scale_exponent: list[Tensor | None],
        column_scale_exponent: Tensor | None, low_rank_scale_exponent: list[Tensor | None],
    ) -> list[Tensor]:  # fmt: skip
        members = linears_of(
            signs, scale, low_rank_in, low_rank_out, low_rank_scale, bias, scale_exponent, low_rank_scale_exponent
        )
        columns = maybe_values(column_scale, column_scale_exponent)
        return _linears(x, members, columns, activation_bits, fast=fast)

    return linear_group


def _fused_group(
    x: Tensor, gate: Tensor | None, prologue: str, eps: float, gain: Tensor | None, shift: Tensor | None,
    transform_scale: Tensor | None, left: Tensor | None, right: Tensor | None, transform_scale_exponent: Tensor | None,
    left_exponent: Tensor | None, right_exponent: Tensor | None, signs: list[Tensor], scale: list[Tensor],
    column_scale: Tensor | None, low_rank_in: list[Tensor | None], low_rank_out: list[Tensor | None],
    low_rank_scale: list[Tensor | None], bias: list[Tensor | None], residual: list[Tensor | None],
    activation_bits: int, scale_exponent: list[Tensor | None], column_scale_exponent: Tensor | None,
    low_rank_scale_exponent: list[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    """Implementation of bwla::fused_group, Triton or plain torch; prologue to results, everything is float32."""
    group = linears_of(
        signs, scale, low_rank_in, low_rank_out, low_rank_scale, bias, scale_exponent, low_rank_scale_exponent
    )
    stored = zip((transform_scale, left, right), (transform_scale_exponent, left_exponent, right_exponent), strict=True)
    before = portable.Prologue(prologue, eps, gain, shift, gate, *transform_values(stored))
    check_prologue(x, before)
    check_residuals(x, group, residual)
    if gate is not None:
        before = dataclasses.replace(before, gate=rows_of(gate))
    columns = maybe_values(column_scale, column_scale_exponent)
    if on_triton.serves(x):
        ys = on_triton.fused(rows_of(x), before, group, residual, columns, activation_bits)
        return [shaped_like(y, x) for y in ys]
    rows = portable.prologue(rows_of(x), before).view(x.shape)
    results = _linears(rows, group, columns, activation_bits, fast=False)
    sums = (y if add is None else y + add.float() for y, add in zip(results, residual, strict=True))
    return [y.to(x.dtype) for y in sums]


def _prologue(x: Tensor, kind: str, eps: float, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """Implementation of bwla::prologue in plain torch: a norm or activation function alone, in float32."""
    before = portable.Prologue(kind, eps, gain, shift)
    check_prologue(x, before)
    if kind == "none":
        raise ShapeError("prologue 'none' computes nothing: its result would alias its input")
    return shaped_like(portable.prologue(rows_of(x), before), x)


def _experts_with(fast: bool) -> Any:
    """Return the implementation of bwla::experts."""

    def experts(
        x: Tensor, experts: Tensor, signs: Tensor, scale: Tensor, column_scale: Tensor | None,
        low_rank_in: Tensor | None, low_rank_out: Tensor | None, low_rank_scale: Tensor | None, activation_bits: int,
        scale_exponent: Tensor | None = None, column_scale_exponent: Tensor | None = None,
        low_rank_scale_exponent: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        pair = low_rank_pair(low_rank_in, low_rank_out, maybe_values(low_rank_scale, low_rank_scale_exponent))
        columns = maybe_values(column_scale, column_scale_exponent)
        packed = Experts(signs, values(scale, scale_exponent), columns, pair, activation_bits)
        check_experts(x, experts, packed)
        if x.is_cuda:
            on_triton.warn_slow("mixtures of experts have no kernels for GPUs yet; run them on the CPU")
        library = compiled.kernels() if fast and native.wanted() else None
        y = expert_products(x.float(), experts.flatten(), packed, library=library)
        return y.to(x.dtype).view(*experts.shape, y.shape[-1])

    return experts


def _transform(
    x: Tensor, scale: Tensor | None, left: Tensor | None, right: Tensor | None, scale_exponent: Tensor | None = None,
    left_exponent: Tensor | None = None, right_exponent: Tensor | None = None,
) -> Tensor:  # fmt: skip
    factors = zip((scale, left, right), (scale_exponent, left_exponent, right_exponent), strict=True)
    factored = transform_values(factors)
    if on_triton.serves(x):
        return shaped_like(on_triton.transform(rows_of(x), *factored), x)
    return portable.transform(x, *factored)


def _installing(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Return the implementation of bwla::<name> for the CPU where the C++ operators do not serve yet, or cannot."""
    op = getattr(torch.ops.bwla, name).default

    def call(*arguments: Any) -> Any:
        return op(*arguments) if native.install() else implementation(*arguments)

    return call


def _experts_installing(*arguments: Any) -> Any:
    """Implementation of bwla::experts for the CPU; the C++ operators have none."""
    native.install()
    return _experts_with(True)(*arguments)


def _refuse_gradient(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    raise GradientError(
        "quantized linears have no gradient; use torch.no_grad() for inference, or train the model before it is "
        "quantized"
    )


ON_CPU: dict[str, Callable[..., Any]] = {
    "transform": _installing("transform", _transform),
    "linear": _installing("linear", _linear_with(True)),
    "linear_group": _installing("linear_group", _group_with(True)),
    "fused_group": _installing("fused_group", _fused_group),
    "linear_of": anchors.linear_of,
    "transform_of": anchors.transform_of,
    "prologue_of": anchors.prologue_of,
    "prologue": _installing("prologue", _prologue),
    "experts": _experts_installing,
    "int8_linear": _installing("int8_linear", end_ops.int8_linear_with(True)),
    "int8_embedding": _installing("int8_embedding", end_ops.int8_embedding),
    "int4_linear": _installing("int4_linear", end_ops.int4_linear_with(True)),
    "int4_embedding": _installing("int4_embedding", end_ops.int4_embedding),
    "attend": _installing("attend", attention.attend),
    "cached_attention": _installing("cached_attention", cached_attention.cached_attention),
}
ELSEWHERE: dict[str, Callable[..., Any]] = {
    "transform": _transform,
    "linear": _linear_with(False),
    "linear_group": _group_with(False),
    "fused_group": _fused_group,
    "prologue": _prologue,
    "int8_linear": end_ops.int8_linear_with(False),
    "int8_embedding": end_ops.int8_embedding,
    "int4_linear": end_ops.int4_linear_with(False),
    "int4_embedding": end_ops.int4_embedding,
    "attend": attention.attend,
    "cached_attention": cached_attention.cached_attention,
}
"""Operators by what they do on other devices, of which a GPU's compiled graph can be made: kernels and torch's own."""

for _name, _implementation in ON_CPU.items():
    LIBRARY.impl(_name, _implementation, "CPU")
for _name, _implementation in ELSEWHERE.items():
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
for _n in ROUTINE_RESULTS:
    LIBRARY.impl(f"routine{_n}", programs.run_routine, "CompositeExplicitAutograd")
    LIBRARY.impl(f"routine{_n}", torch.library.fallthrough_kernel, "Autograd")  # the calls inside see to gradients
for _name in ("sin", "cos"):  # torch's own, behind a name that no compiler replaces by an approximation of its own
    LIBRARY.impl(_name, getattr(torch, _name), "CompositeExplicitAutograd")
LIBRARY.impl("part", anchors.part, "CompositeExplicitAutograd")
LIBRARY.impl("experts", _experts_with(False), "CompositeExplicitAutograd")
LIBRARY.impl("refuse_gradient", _refuse_gradient, "CompositeExplicitAutograd")


# ---------------------------------------------------------------- shapes


def _fake_same(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_linear(x: Tensor, signs: Tensor, *rest: Any) -> Tensor:
    return empty_result(x, n_rows(signs))


def _fake_linear_group(x: Tensor, signs: list[Tensor], *rest: Any) -> list[Tensor]:
    return [empty_result(x, n_rows(member)) for member in signs]


def _fake_fused_group(x: Tensor, *rest: Any) -> list[Tensor]:
    signs = rest[11]
    return [empty_result(x, n_rows(member)) for member in signs]


def _fake_routine(inputs: list[Tensor], caches: list[Tensor], text: str) -> Tensor | tuple[Tensor, ...]:
    return routines.one_or_all(routines.parsed(text).empty([*inputs, *caches]))


def _fake_experts(x: Tensor, experts: Tensor, signs: Tensor, *rest: Any) -> Tensor:
    return x.new_empty([*experts.shape, signs.shape[2]])


def _fake_refuse_gradient(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    return gradient.new_empty(shape)


_FAKES: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("transform", _fake_same),
    ("prologue", _fake_same),
    ("sin", torch.empty_like),
    ("cos", torch.empty_like),
    ("linear", _fake_linear),
    ("linear_of", anchors.fake_linear_of),
    ("transform_of", _fake_same),
    ("prologue_of", _fake_same),
    ("part", anchors.fake_part),
    ("linear_group", _fake_linear_group),
    ("fused_group", _fake_fused_group),
    *((f"routine{n}", _fake_routine) for n in ROUTINE_RESULTS),
    ("experts", _fake_experts),
    ("int8_linear", end_ops.fake_linear),
    ("int4_linear", end_ops.fake_linear),
    ("int8_embedding", end_ops.fake_int8_embedding),
    ("int4_embedding", end_ops.fake_int4_embedding),
    ("attend", attention.fake_attend),
    ("cached_attention", cached_attention.fake_cached_attention),
    ("refuse_gradient", _fake_refuse_gradient),
)
for _name, _fake in _FAKES:
    torch.library.register_fake(f"bwla::{_name}", _fake, lib=LIBRARY)


# ---------------------------------------------------------------- gradients


class _Refusal(torch.autograd.Function):
    """Runs an operator; its backward asks for a gradient that raises when it is computed, and not before.

    So a graph traced ahead of time may hold it and never run it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[], Any]) -> Any:
        ctx.shape = x.shape
        result = run()
        return tuple(result) if isinstance(result, list) else result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.ops.bwla.refuse_gradient(gradients[0], ctx.shape), None


def _is_plain(x: Tensor) -> bool:
    """Return whether x is an ordinary CPU tensor outside all tracing, so that dispatch may be cut short."""
    return type(x) is Tensor and x.is_cpu and not torch._C._len_torch_dispatch_stack()


def _asking(arguments: Iterable[Any]) -> Tensor | None:
    """Return the first tensor, in lists too, that asks for a gradient."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.requires_grad:
                return argument
        elif isinstance(argument, (list, tuple)) and (found := _asking(argument)) is not None:
            return found
    return None


def _differentiable(name: str, direct: Callable[..., Any]) -> Callable[..., Any]:
    """Return the autograd kernel of bwla::<name>; `direct` is its CPU implementation."""
    op = getattr(torch.ops.bwla, name).default

    def kernel(keys: Any, x: Tensor, *rest: Any) -> Any:
        tracked = _asking((x, *rest)) if torch.is_grad_enabled() else None
        if tracked is None and _is_plain(x):
            return direct(x, *rest)  # a second dispatch would cost more than the operator's own Python

        def run() -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keys & torch._C._after_autograd_keyset, x, *rest)

        result = run() if tracked is None else _Refusal.apply(tracked, run)  # type: ignore[no-untyped-call]
        return list(result) if isinstance(result, tuple) else result

    return kernel


for _name in (
    "transform",
    "linear",
    "linear_of",
    "transform_of",
    "prologue_of",
    "linear_group",
    "fused_group",
    "prologue",
    "experts",
    "int8_linear",
    "int4_linear",
    "attend",
    "cached_attention",
):
    LIBRARY.impl(_name, _differentiable(_name, ON_CPU[_name]), "Autograd", with_keyset=True)

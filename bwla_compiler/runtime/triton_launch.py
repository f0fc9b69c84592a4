"""Launches of emitted Triton kernels: one jit function a source, arguments by name, on the device of the tensors."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from bwla_compiler.codegen import triton_module
from bwla_compiler.codegen.triton_gemv import emit_linear_gemv
from bwla_compiler.codegen.triton_int4 import emit_int4_linear
from bwla_compiler.codegen.triton_int8 import emit_int8_linear
from bwla_compiler.codegen.triton_linear import emit_linear_dot, emit_linear_sum, emit_low_rank
from bwla_compiler.codegen.triton_prologue import emit_prologue
from bwla_compiler.codegen.triton_spec import Emitted, Precision
from bwla_compiler.runtime.triton_layout import exact_in_tf32

prologue_of = functools.cache(emit_prologue)
linear_dot_of = functools.cache(emit_linear_dot)
linear_sum_of = functools.cache(emit_linear_sum)
linear_gemv_of = functools.cache(emit_linear_gemv)
low_rank_of = functools.cache(emit_low_rank)
int8_linear_of = functools.cache(emit_int8_linear)
int4_linear_of = functools.cache(emit_int4_linear)
function_of = functools.cache(triton_module.load)

_EXACT: ContextVar[bool] = ContextVar("whether factors of a traced call are exact in tf32", default=False)


def launch(emitted: Emitted, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Run a kernel on the arguments that it names, on the device of its tensors."""
    own = {name: arguments[name] for name, _ in emitted.parameters}
    first = next(value for value in own.values() if isinstance(value, Tensor))
    if not _is_plain(first):
        _launch_traced(emitted, grid, own)
        return
    with torch.cuda.device_of(first):
        function_of(emitted)[grid](**own, **emitted.options)


def _is_plain(tensor: Tensor) -> bool:
    """Whether this is memory, and no tensor that stands for it while a graph is traced."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch._C._len_torch_dispatch_stack()


def _launch_traced(emitted: Emitted, grid: tuple[int, ...], own: Mapping[str, Any]) -> None:
    """Put the launch into the graph that is traced, where Inductor sees the kernel; sums are fused by default there."""
    from torch.library import wrap_triton

    options = {name: value for name, value in emitted.options.items() if name != "enable_fp_fusion"}
    wrap_triton(function_of(emitted))[grid](**own, **options)


def precision_of(x: Tensor, *factors: Tensor | None) -> Precision:
    """Return how float products with these factors run, on matrix units where there are any for it."""
    if not x.is_cuda or torch.version.hip is not None:
        return "ieee"
    return "tf32x2" if all(_is_exact(f) for f in factors if f is not None) else "tf32x3"


def _is_exact(factor: Tensor) -> bool:
    return exact_in_tf32(factor) if _is_plain(factor) else _EXACT.get()


@contextmanager
def factors_are_exact(exact: bool) -> Iterator[None]:
    """Say, while a call is traced, whether its factors are exact in tf32: they have no values to be asked."""
    before = _EXACT.set(exact)
    try:
        yield
    finally:
        _EXACT.reset(before)


def has_dp4a(x: Tensor) -> bool:
    """Return whether the decode kernel serves x's device: CUDA, and the interpreter, which stands in for it."""
    return torch.version.hip is None or not x.is_cuda

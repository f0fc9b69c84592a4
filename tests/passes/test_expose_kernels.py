"""ExposeKernels: what operators run on a GPU stands in Inductor's graph, and in its code; no GPU is needed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from bwla_compiler.codegen import triton_module
from bwla_compiler.passes import expose_kernels
from bwla_compiler.passes.expose_kernels import ExposeKernels
from bwla_compiler.runtime import portable, triton_tuner
from bwla_compiler.runtime.ops import LIBRARY
from bwla_compiler.runtime.portable import Prologue
from tests.passes import fake_gpu

pytestmark = pytest.mark.skipif(not triton_module.installed(), reason="triton is not installed")

OPS: Any = getattr(torch.ops, LIBRARY.ns)
KERNEL = triton_kernel_wrapper_functional
COLUMNS = 256


@pytest.fixture
def gpu() -> Iterator[FakeTensorMode]:
    """Return the mode of fake tensors, while Triton translates for an H100."""
    triton_tuner.forget_choices()
    with fake_gpu.target():
        yield FakeTensorMode()
    triton_tuner.forget_choices()


def block(x: Tensor, gain: Tensor, words: Tensor, scale: Tensor, left: Tensor) -> Tensor:
    """A norm by head, then down of a block: a gate, a change of basis, one linear, and the residual."""
    normed = OPS.prologue.default(x.view(-1, 64), "rms_norm", 1e-6, gain, None).view(x.shape)
    none = [None]
    before = (normed, x, "silu_mul", 0.0, None, None, None, left, None, None, None, None)
    (y,) = OPS.fused_group.default(*before, [words], [scale], None, none, none, none, none, [x], 6, none, None, none)
    result: Tensor = y + 1
    return result


def operands(mode: FakeTensorMode, tokens: int = 1, device: str = "cuda") -> tuple[Tensor, ...]:
    with mode, torch.device(device):
        words = torch.empty(1, COLUMNS // 128, COLUMNS, 4, dtype=torch.int32)
        x = torch.empty(tokens, COLUMNS, dtype=torch.bfloat16)
        return x, torch.empty(64), words, torch.empty(1, COLUMNS, 1), torch.empty(16, 16)


def traced(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """Return the graph of a function, our operators whole."""
    with torch.no_grad():
        found: GraphModule = make_fx(function)(*inputs)
    return found


def ours(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if str(node.target).startswith(f"{LIBRARY.ns}.")]


@pytest.mark.parametrize("tokens, kernels", [(1, 2), (8, 2)])
def test_operators_become_kernels_that_edit_nothing_but_their_results(
    tokens: int, kernels: int, gpu: FakeTensorMode
) -> None:
    graph = traced(block, *operands(gpu, tokens)).graph
    report = ExposeKernels().run(graph)
    assert ours(graph) == []
    found = [node for node in graph.nodes if node.target is KERNEL]
    assert [set(node.kwargs["tensors_to_clone"]) for node in found] == [{"out", "token_scale", "code_sum"}, {"y_0"}]
    assert [outcome for _, outcome in report.changed] == ["torch's operations", f"{kernels} kernels of its own"]
    assert not report.skipped
    assert not ExposeKernels().run(graph).changed, "twice is once"


@pytest.mark.parametrize("tokens, kernels", [(1, 2), (8, 2), (32, 3)])
def test_low_rank_pairs_are_read_only(tokens: int, kernels: int, gpu: FakeTensorMode) -> None:
    with gpu, torch.device("cuda"):
        into, onto = (torch.empty(shape, dtype=torch.int8) for shape in ((20, COLUMNS), (COLUMNS, 20)))
        pair = (into, onto, torch.empty(20))

    def function(x: Tensor, words: Tensor, scale: Tensor, *pair: Tensor) -> Tensor:
        y: Tensor = OPS.linear.default(x, words, scale, None, *pair, None, 6)
        return y

    x, _, words, scale, _ = operands(gpu, tokens)
    graph = traced(function, x, words, scale, *pair).graph
    ExposeKernels().run(graph)
    found = [set(node.kwargs["tensors_to_clone"]) for node in graph.nodes if node.target is KERNEL]
    assert len(found) == kernels
    assert set.union(*found) == {"out", "token_scale", "code_sum", "mixed", "y_0"}


def test_calls_that_are_alike_are_traced_once(gpu: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    made, graph_of = [], expose_kernels._graph_of
    monkeypatch.setattr(expose_kernels, "_graph_of", lambda f, v, s: made.append(f) or graph_of(f, v, s))

    def twice(x: Tensor, *rest: Tensor) -> Tensor:
        return block(block(x, *rest), *rest)

    graph = traced(twice, *operands(gpu)).graph
    ExposeKernels().run(graph)
    assert len(made) == 2
    assert sum(node.target is KERNEL for node in graph.nodes) == 4


def test_factors_are_two_products_where_they_are_known_to_be_exact(gpu: FakeTensorMode) -> None:
    from torch._functorch._aot_autograd.descriptors import BufferAOTInput
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    def prologue_of(exact: tuple[str, ...]) -> str:
        graph = traced(block, *operands(gpu)).graph
        left = [node for node in graph.nodes if node.op == "placeholder"][-1]
        left.meta["desc"] = BufferAOTInput("factor")
        ExposeKernels(exact).run(graph)
        first = next(node for node in graph.nodes if node.target is KERNEL)
        source: str = kernel_side_table.get_kernel(first.kwargs["kernel_idx"]).fn.__globals__["from_left"].src
        return source

    assert '"tf32x3"' in prologue_of(())
    assert '"tf32x3"' not in prologue_of(("factor",))


def test_what_is_on_the_cpu_stays() -> None:
    graph = traced(block, *operands(FakeTensorMode(), device="cpu")).graph
    before = ours(graph)
    assert before
    report = ExposeKernels().run(graph)
    assert ours(graph) == before
    assert not report.changed + report.skipped


def test_sizes_that_are_not_fixed_stay_calls_with_the_reason() -> None:
    def function(x: Tensor) -> Tensor:
        y: Tensor = OPS.prologue.default(x, "silu", 0.0, None, None)
        return y

    graph = make_fx(function, tracing_mode="symbolic")(torch.empty(5, 64)).graph
    node = next(node for node in graph.nodes if node.target is OPS.prologue.default)
    assert expose_kernels._refusal(node) == "a size is not fixed, and its kernels depend on the number of tokens"


def test_a_norm_in_torchs_operations_is_the_operators() -> None:
    x, gain = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), torch.full((64,), 1.5)
    mode = FakeTensorMode()
    values = [mode.from_tensor(x), "rms_norm", 1e-6, mode.from_tensor(gain), None]
    spec = torch.utils._pytree.tree_flatten(values)[1]
    gm = expose_kernels._graph_of(expose_kernels._IMPLEMENTATIONS[OPS.prologue.default], values, spec)
    # the same float32 operations, one by one
    assert torch.allclose(gm(x, gain), portable.prologue(x, Prologue("rms_norm", 1e-6, gain)), rtol=1e-6)


def test_inductor_writes_code_that_launches_the_kernels_itself(gpu: FakeTensorMode) -> None:
    given = operands(gpu)
    gm = traced(lambda *inputs: (block(*inputs),), *given)
    ExposeKernels().run(gm.graph)
    gm.recompile()
    code = fake_gpu.inductor_code(gm, given)
    calls = code[code.index("def call(") :]
    assert "torch.ops" not in calls
    assert [name for name in ("prologue_0.run(", "linear_gemv_1.run(") if name not in calls] == []
    assert "clone" not in calls, "no kernel works on a copy"
    assert "dp4a.u32.s32" in code

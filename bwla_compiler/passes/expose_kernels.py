"""ExposeKernels: on a GPU, operators become the kernels and torch operations that they run, in Inductor's sight."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch._aot_autograd.descriptors import BufferAOTInput
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from bwla_compiler.passes.base import PassReport
from bwla_compiler.runtime import on_triton
from bwla_compiler.runtime.ops import ELSEWHERE, LIBRARY
from bwla_compiler.runtime.rehearsal import rehearse
from bwla_compiler.runtime.triton_launch import factors_are_exact

_OPS: Any = getattr(torch.ops, LIBRARY.ns)
_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {getattr(_OPS, name).default: f for name, f in ELSEWHERE.items()}
_FACTORS: dict[Any, tuple[int, int]] = {_OPS.transform.default: (2, 3), _OPS.fused_group.default: (7, 8)}
"""Where operators have the factors of a change of basis."""

_CHOOSING = (_OPS.transform.default, _OPS.linear.default, _OPS.linear_group.default, _OPS.fused_group.default)
"""Operators with several kernels or tiles to choose from."""


class ExposeKernels:
    """Put what operators do on a GPU in their place, for each shape as it is launched eagerly.

    Inductor then allocates what they need, launches the kernels itself, and fuses torch's own operations (norms by
    head, embeddings) with what stands around them. Works in place, after all passes on whole operators; nodes need
    meta "val". exact: names of the inputs that hold factors whose entries are exact in tf32.

    A call with a size that is not fixed stays: its kernels are chosen by the number of tokens. So does one whose scales
    are stored bits: the operator decodes them once, the graph would at each step.
    """

    name: ClassVar[str] = "expose-kernels"

    def __init__(self, exact: Collection[str] = ()) -> None:
        self._exact = frozenset(exact)
        self._traced: dict[Any, GraphModule] = {}

    def run(self, graph: Graph) -> PassReport:
        """Rewrite in place; the report lists each operator taken apart, and each that stays, with its reason."""
        report = PassReport(self.name)
        for node in list(graph.nodes):
            if not (node.op == "call_function" and str(node.target).startswith(f"{LIBRARY.ns}.") and _on_gpu(node)):
                continue
            if reason := _refusal(node):
                report.skip(node.name, reason)
                continue
            traced = self._trace(node)
            _inline(graph, node, traced)
            count = _n_kernels(traced)
            report.changed.append((node.name, f"{count} kernels of its own" if count else "torch's operations"))
        if report.changed:
            graph.eliminate_dead_code()
            graph.lint()
        return report

    def _trace(self, node: Node) -> GraphModule:
        """Return the operator's implementation as a graph of its tensors, which calls that are alike share."""
        exact = all(map(self._is_exact, _factors(node)))
        values, spec = _values(node)
        key = (node.target, spec, exact, *map(_description, values))
        if key not in self._traced:
            arguments = pytree.tree_unflatten(values, spec)
            if node.target in _CHOOSING:
                rehearse(_IMPLEMENTATIONS[node.target], arguments, exact=exact)
            with factors_are_exact(exact):
                self._traced[key] = _graph_of(_IMPLEMENTATIONS[node.target], values, spec)
        return self._traced[key]

    def _is_exact(self, factor: Node) -> bool:
        described = factor.meta.get("desc")
        return isinstance(described, BufferAOTInput) and described.target in self._exact


def _on_gpu(node: Node) -> bool:
    first = next(iter(pytree.tree_leaves(node.meta.get("val"))), None)
    return isinstance(first, Tensor) and first.is_cuda


def _refusal(node: Node) -> str:
    """Return why an operator cannot be taken apart, or ""."""
    if node.target not in _IMPLEMENTATIONS:
        return "it has no kernels for GPUs"
    values, _ = _values(node)
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(not isinstance(size, int) for tensor in tensors for size in (*tensor.shape, *tensor.stride())):
        return "a size is not fixed, and its kernels depend on the number of tokens"
    if any(isinstance(value, torch.SymInt) for value in values):
        return "one of its numbers is not fixed"
    if any(tensor.dtype == torch.int16 for tensor in tensors):
        return "its scales are stored bits, which the operator decodes once"
    return "" if on_triton.serves(tensors[0]) else "Triton does not serve it"


def _factors(node: Node) -> list[Node]:
    places = _FACTORS.get(node.target, ())
    return [node.args[i] for i in places if i < len(node.args) and isinstance(node.args[i], Node)]  # type: ignore[misc]


def _values(node: Node) -> tuple[list[Any], pytree.TreeSpec]:
    """Return the operands of a call, flat, with fake tensors in place of nodes, and their structure."""
    leaves, spec = pytree.tree_flatten(list(node.args))
    return [leaf.meta["val"] if isinstance(leaf, Node) else leaf for leaf in leaves], spec


def _description(value: Any) -> Any:
    """Return all of an operand that its kernels depend on."""
    if not isinstance(value, Tensor):
        return value
    return value.shape, value.stride(), value.dtype, value.device


def _graph_of(implementation: Callable[..., Any], values: Sequence[Any], spec: pytree.TreeSpec) -> GraphModule:
    """Return what an implementation does with its tensors, functional: a graph of them alone, in order."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = [value for value in values if isinstance(value, Tensor)]

    def run(*given: Tensor) -> Any:
        rest = iter(given)
        return implementation(
            *pytree.tree_unflatten([next(rest) if isinstance(v, Tensor) else v for v in values], spec)
        )

    with _mode_of(tensors), torch.no_grad():
        traced = make_fx(dispatch_functionalize(run), decomposition_table=select_decomp_table())(*tensors)
    traced.graph.eliminate_dead_code()
    return traced


def _n_kernels(traced: GraphModule) -> int:
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional

    return sum(node.target is triton_kernel_wrapper_functional for node in traced.graph.nodes)


def _mode_of(tensors: Sequence[Tensor]) -> FakeTensorMode:
    mode = torch._guards.detect_fake_mode(list(tensors))
    assert isinstance(mode, FakeTensorMode)
    return mode


def _inline(graph: Graph, call: Node, traced: GraphModule) -> None:
    """Put a copy of the traced graph in the place of a call."""
    operands = iter([leaf for leaf in pytree.tree_leaves(list(call.args)) if isinstance(leaf, Node)])
    copies: dict[Node, Node] = {}
    results: Any = None
    with graph.inserting_before(call):
        for node in traced.graph.nodes:
            assert node.op != "get_attr", "a constant of an operator is a number"
            if node.op == "placeholder":
                copies[node] = next(operands)
            elif node.op == "output":
                results = torch.fx.map_arg(node.args[0], copies.__getitem__)
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
    if isinstance(results, Node):
        call.replace_all_uses_with(results)
    else:
        for user in list(call.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(call)

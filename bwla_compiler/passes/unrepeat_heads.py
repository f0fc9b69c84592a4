"""UnrepeatHeads: grouped-query attention on a CPU reads heads of keys and values themselves, not copies of them.

transformers writes each head of the cache n times in a row before attention. torch's flash kernel for CPUs takes fewer
heads of keys and values than of queries, and has query head h read head h // n: the one that its copy was made of.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.graph_order import mutation_between

_ATEN: Any = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default)


@dataclass(frozen=True)
class Repeat:
    """Heads written n times in a row: source [batch, heads, length, size] -> [batch, heads * n, length, size].

    first: the first operation of it, which reads the source. n: a number, or symbolic.
    """

    source: Node
    first: Node
    n: Any


@dataclass(frozen=True)
class UnrepeatHeads:
    """Give attention the keys and values of which its operands are copies by heads, where both are, equally often.

    Works in place on a functional aten graph after decompositions, static or symbolic; nodes need meta "val". There
    torch has chosen the kernel by then: fewer heads cannot move a call to a slower one. Kernels of GPUs are left alone:
    those that take a mask do not take groups.

    In float32 the bits are the same: products of the same blocks in the same order. In bfloat16 and float16, processors
    with AMX may pack keys for long prompts where they did not for more heads, and round otherwise.
    """

    name: ClassVar[str] = "unrepeat-heads"

    def run(self, graph: Graph) -> PassReport:
        """Rewrite what can be; the report lists each attention, and why it was left. Copies that others read stay."""
        report = PassReport(self.name)
        for node in graph.find_nodes(op="call_function", target=_ATTENTION):
            key, value = (match_repeat(operand) for operand in node.args[1:3])
            if key is None or value is None:
                report.skip(node.name, "its keys or values are no copies of fewer heads")
            elif reason := _refusal(graph, node, key, value):
                report.skip(node.name, reason)
            else:
                node.args = (node.args[0], key.source, value.source, *node.args[3:])
                report.changed.append((node.name, f"each head of keys and values is read by {key.n} of queries"))
        if report.changed:
            graph.eliminate_dead_code()
            graph.lint()
        return report


def match_repeat(node: Any) -> Repeat | None:
    """Return the repeat by heads that a node holds, as repeat_interleave or expand and reshape make it; else None."""
    view = _behind_copies(node)
    expand = _behind_copies(view.args[0]) if view is not None and view.target in _VIEWS else None
    first = expand.args[0] if expand is not None and expand.target is _ATEN.expand.default else None
    if not isinstance(first, Node) or first.target is not _ATEN.unsqueeze.default:
        return None
    source = first.args[0]
    shape, copies, repeated = (_shape(n) for n in (source, expand, view))
    if len(shape) != 4 or len(copies) != 5 or not isinstance(source, Node):
        return None
    batch, heads, length, size = shape
    n = copies[2]
    axis = first.args[1] % 5  # type: ignore[operator]  # an int, by the operator's schema
    copied = axis == 2 and _equal(copies, (batch, heads, n, length, size))
    return Repeat(source, first, n) if copied and _equal(repeated, (batch, heads * n, length, size)) else None


def _refusal(graph: Graph, attention: Node, key: Repeat, value: Repeat) -> str:
    """Return why attention cannot read the sources of two repeats, or ""."""
    if not statically_known_true(key.n == value.n):
        return f"its keys are copied {key.n} times, its values {value.n} times"
    for repeat in (key, value):
        if not statically_known_true(repeat.source.meta["val"].stride(-1) == 1):
            return f"{repeat.source.name} is not dense in its last dimension, as the kernel wants it"
        if (edit := mutation_between(graph, repeat.first, attention)) is not None:
            return f"{edit.name} edits a tensor in place between {repeat.first.name} and it"
    return ""


def _behind_copies(node: Any) -> Node | None:
    """Return the node of which this one is a plain copy, itself where it is none; None for what is no node."""
    while isinstance(node, Node) and node.target is _ATEN.clone.default:
        node = node.args[0]
    return node if isinstance(node, Node) else None


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _equal(found: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    """Whether two shapes are the same whatever their symbols stand for; no guard is added."""
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(statically_known_true(a == b) for a, b in pairs)

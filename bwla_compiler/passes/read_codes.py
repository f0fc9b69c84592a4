"""ReadCodes: attention of one token reads the codes of an int8 cache, and not floats that were made of them."""

from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.graph_order import mutation_between
from bwla_compiler.passes.match_graph import TARGETS, dtype_of, is_cast
from bwla_compiler.runtime.ops import LIBRARY

_ATTEND: Any = getattr(torch.ops, LIBRARY.ns).attend.default


class ReadCodes:
    """Hand `bwla.attend` codes with their scales where its keys and values are products of the two.

    Works in place on a functional aten graph after decompositions; nodes need meta "val". The kernel multiplies codes
    by scales as the graph did: the bits are the same, and a step no longer writes the whole cache as floats.
    """

    name: ClassVar[str] = "read-codes"

    def run(self, graph: Graph) -> PassReport:
        """Rewrite what can be; the report lists each attention whose cache holds codes, and why one was left."""
        report = PassReport(self.name)
        node: Any
        for node in graph.find_nodes(op="call_function", target=_ATTEND):
            query, *operands = node.args[:3]
            keys, values = map(_codes_of, operands)
            if query.meta["val"].shape[2] != 1:
                report.skip(node.name, "it has more than one token")
            elif keys is None or values is None:
                report.skip(node.name, "its keys and values are no codes with scales")
            elif edit := next((e for floats in operands if (e := mutation_between(graph, floats, node))), None):
                report.skip(node.name, f"{edit.name} edits a tensor in place between its operands and it")
            else:
                _replace(graph, node, keys, values)
                report.changed.append((node.name, "it reads int8 codes"))
        if report.changed:
            graph.eliminate_dead_code()
            graph.lint()
        return report


def _replace(graph: Graph, node: Node, keys: tuple[Node, Node], values: tuple[Node, Node]) -> None:
    """Put a call on codes in the place of one on floats. A new one: a call remembers what it was traced with."""
    query, _, _, mask, scale, *_ = node.args
    with graph.inserting_before(node):
        call = graph.call_function(_ATTEND, (query, keys[0], values[0], mask, scale, False, keys[1], values[1]))
    call.meta = {"val": node.meta["val"]}
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _codes_of(node: Any) -> tuple[Node, Node] | None:
    """Return (codes, scale) where a node is codes as float32 times their scales [..., 1]."""
    if not isinstance(node, Node) or node.target not in TARGETS["mul"] or dtype_of(node) != torch.float32:
        return None
    operands: tuple[Any, ...] = node.args
    for floats, scale in (operands, operands[::-1]):
        if not is_cast(floats) or not isinstance(scale, Node):
            continue
        codes: Node = floats.args[0]
        fits = dtype_of(codes) == torch.int8 and dtype_of(scale) == torch.float32
        if fits and tuple(scale.meta["val"].shape) == (*codes.meta["val"].shape[:3], 1):
            return codes, scale
    return None

"""FuseKernels: packed linears that read one tensor become one call, which rounds their input once."""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from bwla_compiler.passes.base import PassReport
from bwla_compiler.runtime.ops import LIBRARY

_OPS: Any = getattr(torch.ops, LIBRARY.ns)
_LINEAR: frozenset[Any] = frozenset({_OPS.linear, _OPS.linear.default})


@dataclass(frozen=True)
class FuseKernels:
    """Put linears with the same input and activation bits into one `bwla.linear_group` (q/k/v, gate/up).

    Works on the graph of torch.compile, in place; everything else is left to the backend below.
    """

    name: ClassVar[str] = "fuse-kernels"

    def run(self, gm: GraphModule) -> PassReport:
        """Merge what can be merged; linears that stand alone are listed with the reason."""
        report = PassReport(self.name)
        groups: dict[tuple[Any, ...], list[Node]] = {}
        for node in gm.graph.nodes:
            if node.op == "call_function" and node.target in _LINEAR:
                groups.setdefault(_shared(node), []).append(node)
        for members in groups.values():
            names = ", ".join(m.name for m in members)
            if len(members) == 1:
                report.skip(names, "no other linear reads its input")
            elif reason := _refusal(members):
                report.skip(names, reason)
            else:
                report.changed.append((names, f"one call of {len(members)} linears"))
                _merge(gm, members)
        if report.changed:
            gm.graph.lint()
            gm.recompile()
        return report


_N_OPERANDS = 12
"""Of bwla::linear: x, signs, scale, column scale, low rank (3), bias, bits, and three exponents."""


def _operands(linear: Node) -> tuple[Any, ...]:
    """All operands of a linear by position, None for those left out."""
    return (*linear.args, *(None,) * (_N_OPERANDS - len(linear.args)))


def _shared(linear: Node) -> tuple[Any, ...]:
    """What the members of a group must have in common: input, column scale and its exponent, activation bits."""
    operands = _operands(linear)
    return operands[0], operands[3], operands[10], operands[8]


def _refusal(members: list[Node]) -> str:
    """Return why linears cannot be one call: an operand of a later one may be computed from an earlier one."""
    earlier = set(members)
    for node in members:
        frontier = [operand for operand in node.all_input_nodes if operand is not node.args[0]]
        while frontier:
            operand = frontier.pop()
            if operand in earlier:
                return f"{node.name} depends on {operand.name}"
            frontier.extend(operand.all_input_nodes)
    return ""


def _merge(gm: GraphModule, members: list[Node]) -> None:
    """Replace linears by one group call at the place of the last, and move their readers behind it."""
    graph, last = gm.graph, members[-1]
    x, column_scale, column_exponent, bits = _shared(last)
    columns = list(zip(*map(_operands, members), strict=True))
    signs, scale, low_rank, bias = columns[1], columns[2], columns[4:7], columns[7]
    exponents, rank_exponents = columns[9], columns[11]
    with graph.inserting_before(last):
        operands: list[Any] = [x, signs, scale, column_scale, *low_rank, bias, bits]
        operands += [exponents, column_exponent, rank_exponents]
        group = graph.call_function(
            _OPS.linear_group.default, tuple(list(o) if isinstance(o, tuple) else o for o in operands)
        )
        results = [graph.call_function(operator.getitem, (group, i)) for i in range(len(members))]
    for member, result in zip(members, results, strict=True):
        result.meta = dict(member.meta)
        member.replace_all_uses_with(result)
    _sink_readers(gm, results)
    for member in members:
        graph.erase_node(member)


def _sink_readers(gm: GraphModule, results: list[Node]) -> None:
    """Restore topological order: nodes that read a result but stand before it move behind it, in their order."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    anchor = results[-1]
    limit, moved = order[anchor], set(results)
    after = anchor
    for node in list(gm.graph.nodes):
        if order[node] > limit:
            break
        if node not in moved and any(source in moved for source in node.all_input_nodes):
            after.append(node)
            after = node
            moved.add(node)

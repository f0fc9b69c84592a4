"""FlattenCalls: fused groups on the CPU, where a call costs as much as a small kernel, take one list of operands."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.packed_calls import OPS
from bwla_compiler.runtime.flat import MEMBERS, flatten
from bwla_compiler.spec import FUSED_CALLS


@dataclass(frozen=True)
class FlattenCalls:
    """Write each `bwla.fused_group` on the CPU as the same call, `bwla.fused_call1`, `2`, .., that is cheaper."""

    name: ClassVar[str] = "flatten-calls"

    def run(self, graph: Graph) -> PassReport:
        """Rewrite in place; groups on other devices stay."""
        report = PassReport(self.name)
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target is not OPS.fused_group.default:
                continue
            device = node.args[0].meta["val"].device
            if device != torch.device("cpu"):
                report.skip(node.name, f"its input is on {device}")
                continue
            members = len(node.args[MEMBERS])
            if members not in FUSED_CALLS:
                report.skip(node.name, f"it has {members} results")
                continue
            node.target = getattr(OPS, f"fused_call{members}").default
            node.args = flatten(node.args)
            if members == 1:
                _unpack(node)
            report.changed.append((node.name, "operands in one list"))
        return report


def _unpack(node: Node) -> None:
    """Make the only result of a call, so far the only element of a list, the call's value."""
    node.meta["val"] = node.meta["val"][0]
    for user in list(node.users):
        assert (user.target, user.args[1]) == (operator.getitem, 0)
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)

"""FlattenCalls: fused groups on the CPU, where a call costs as much as a small kernel, take one list of operands."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph

from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.packed_calls import OPS
from bwla_compiler.runtime.flat import flatten


@dataclass(frozen=True)
class FlattenCalls:
    """Write each `bwla.fused_group` on the CPU as the same call, `bwla.fused_call`, that is cheaper from Python."""

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
            node.target = OPS.fused_call.default
            node.args = flatten(node.args)
            report.changed.append((node.name, "operands in one list"))
        return report

"""KeepSines: rotary tables are computed by torch, whose sine and cosine differ from Inductor's in the last bit."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bwla_compiler.passes.base import PassReport
from bwla_compiler.runtime.ops import LIBRARY

_ATEN: Any = torch.ops.aten
_OURS: Any = getattr(torch.ops, LIBRARY.ns)

REPLACED = {_ATEN.sin.default: _OURS.sin.default, _ATEN.cos.default: _OURS.cos.default}


@dataclass(frozen=True)
class KeepSines:
    """Replace sines and cosines on a CPU by operators that call torch's, where a graph has packed linears.

    What depends on them is rounded to a few bits: the last bit of a cosine can move a logit by a hundredth. A step
    computes them once for all layers.
    """

    name: ClassVar[str] = "keep-sines"

    def run(self, graph: Graph) -> PassReport:
        """Replace them in place; the report lists each."""
        report = PassReport(self.name)
        if not any(getattr(node.target, "namespace", "") == LIBRARY.ns for node in graph.nodes):
            return report
        for node in graph.nodes:
            if node.op == "call_function" and node.target in REPLACED and _on_cpu(node):
                node.target = REPLACED[node.target]
                report.changed.append((node.name, "computed by torch"))
        return report


def _on_cpu(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.device.type == "cpu"

"""FoldNorms: gains and shifts of norms move into the linears that read them."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bwla_compiler.graph.plan import Norm
from bwla_compiler.passes.base import DropGain, Edit, PassContext, PassReport, ScaleParameter, ShiftBias


@dataclass(frozen=True)
class FoldNorms:
    """Move norm gains into their readers: W(g * x + b) = (W diag g) x + W b. Exact."""

    name: ClassVar[str] = "fold-norms"

    def run(self, ctx: PassContext) -> PassReport:
        """Emit the edits, the norms nearest to their readers first (gains may follow one another)."""
        report = PassReport(self.name)
        for norm in reversed(ctx.plan.norms):
            name = norm.gain or norm.shift or "norm"
            if not norm.absorbed_by:
                report.skip(name, norm.reason)
            elif self._is_unit(ctx, norm):
                report.skip(name, "already does nothing")
            else:
                report.change(name, *self._edits(ctx, norm))
        return report

    def _is_unit(self, ctx: PassContext, norm: Norm) -> bool:
        unit_gain = norm.gain is None or bool((ctx.parameter(norm.gain) + norm.gain_offset == 1).all())
        return unit_gain and (norm.shift is None or not bool(ctx.parameter(norm.shift).any()))

    def _edits(self, ctx: PassContext, norm: Norm) -> list[Edit]:
        edits: list[Edit] = []
        for name in norm.absorbed_by:
            linear = ctx.plan.linear(name)
            if norm.shift is not None:  # before the gain: W b is with W as it stands
                edits.append(ShiftBias(name, linear.in_axis, ctx.parameter(norm.shift).clone()))
            if norm.gain is not None:
                gain = ctx.parameter(norm.gain).to(torch.float64) + norm.gain_offset
                edits.append(ScaleParameter(linear.parameter, linear.in_axis, gain))
        if norm.gain is not None:
            edits.append(DropGain(norm.gain, 1.0 - norm.gain_offset))
        if norm.shift is not None:
            edits.append(DropGain(norm.shift, 0.0))
        return edits

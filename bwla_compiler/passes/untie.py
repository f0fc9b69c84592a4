"""Untie: a head that shares the embedding's tensor gets a copy, so that norm and rotation can be folded into it."""

from dataclasses import dataclass
from typing import ClassVar

from bwla_compiler.passes.base import PassContext, PassReport
from bwla_compiler.passes.base import Untie as UntieEdit


@dataclass(frozen=True)
class Untie:
    """Split what one tensor does as embedding and as head. Packing may share the codes again (recipe.tied)."""

    name: ClassVar[str] = "untie"

    def run(self, ctx: PassContext) -> PassReport:
        """Emit one edit per tied pair that still shares its tensor."""
        report = PassReport(self.name)
        for embedding, head in ctx.plan.tied:
            shared = ctx.model.get_parameter(embedding) is getattr(ctx.model.get_submodule(head), "weight", None)
            if shared:
                report.change(head, UntieEdit(embedding, head))
            else:
                report.skip(head, "already has a tensor of its own")
        return report

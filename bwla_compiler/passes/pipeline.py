"""The passes in order, and how to run one on a module."""

import time

from torch import nn

from bwla_compiler.passes.apply import apply_module
from bwla_compiler.passes.base import Pass, PassContext, PassReport
from bwla_compiler.passes.fold_norms import FoldNorms
from bwla_compiler.passes.fold_rotations import FoldRotations
from bwla_compiler.passes.insert_online import InsertOnline
from bwla_compiler.passes.quantize_ends import QuantizeEnds
from bwla_compiler.passes.quantize_linears import QuantizeLinears
from bwla_compiler.passes.untie import Untie
from bwla_compiler.recipe import Recipe

PASSES = {p.name: p for p in (Untie, FoldNorms, FoldRotations, InsertOnline, QuantizeLinears, QuantizeEnds)}


def folding_passes(recipe: Recipe) -> tuple[Pass, ...]:
    """Return the passes that rewrite float weights once, before anything is fitted."""
    if recipe.transform.kind == "none":
        return ()
    if not recipe.transform.folded:
        return (Untie(), FoldNorms())
    return (Untie(), FoldNorms(), FoldRotations(residual=recipe.residual == "folded"))


def run_pass(model: nn.Module, step: Pass, ctx: PassContext) -> PassReport:
    """Run one pass and perform its edits on the module, in place; return its report with the time it took."""
    start = time.perf_counter()
    report = step.run(ctx)
    apply_module(model, report.edits)
    report.seconds = time.perf_counter() - start
    return report

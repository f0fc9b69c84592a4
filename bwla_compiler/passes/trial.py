"""The passes that leave a model's function as it is, in their order: what a trial of them runs, without calibration."""

import torch
from torch import nn

from bwla_compiler.graph.plan import Plan
from bwla_compiler.passes.base import Pass
from bwla_compiler.passes.insert_online import InsertOnline
from bwla_compiler.passes.pipeline import folding_passes
from bwla_compiler.passes.quantize_ends import head_names
from bwla_compiler.recipe import Recipe


def exact_passes(model: nn.Module, plan: Plan, recipe: Recipe) -> tuple[Pass, ...]:
    """Return the passes of a recipe up to the one that quantizes: all are exact.

    Where the recipe smooths inputs, their largest values, which calibration would tell, are taken for 1.
    """
    heads = set(head_names(model, plan))
    groups = [g for g in plan.groups if not heads.intersection(g.linears)]
    x_max = {g.name: torch.ones(g.in_features) for g in groups} if recipe.needs_calibration else {}
    return (*folding_passes(recipe), InsertOnline(tuple(g.name for g in groups), x_max=x_max))

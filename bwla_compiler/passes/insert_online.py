"""InsertOnline: an online change of basis before the linears whose input cannot be rotated for free."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bwla_compiler.graph.plan import Group, Linear
from bwla_compiler.numerics.kronecker import factor_pair, hadamard
from bwla_compiler.numerics.okt import fit_okt
from bwla_compiler.numerics.smoothing import smoothing_scale
from bwla_compiler.passes.base import InsertTransform, PassContext, PassReport
from bwla_compiler.passes.fold_rotations import RESIDUAL
from bwla_compiler.recipe import Recipe


@dataclass(frozen=True)
class Factors:
    """Sizes of the Kronecker factors n1 x n2 of a group's input, and whether the right one is already folded."""

    n1: int
    n2: int
    right_folded: bool


@dataclass(frozen=True)
class InsertOnline:
    """Rotate the inputs of groups online: smoothing, then Kronecker factors fitted to their weights (OKT).

    groups: names of the groups to work on. x_max: largest |x| of each input channel [n] by group; groups
    without one are not smoothed. The function of the model does not change.
    """

    groups: tuple[str, ...]
    x_max: Mapping[str, Tensor] = field(default_factory=dict)
    name: ClassVar[str] = "insert-online"

    def run(self, ctx: PassContext) -> PassReport:
        """Emit one edit per group whose input is not yet in its final basis."""
        report = PassReport(self.name)
        for group in ctx.plan.groups:
            if group.name not in self.groups:
                continue
            first = ctx.plan.linear(group.name)
            recipe = ctx.recipe.override_for(first.name)
            if recipe is None:
                report.skip(group.name, "an override keeps it as it is")
            elif reason := skip_reason(first, recipe):
                report.skip(group.name, reason)
            else:
                report.change(group.name, self._fit(ctx, group, recipe))
        return report

    def _fit(self, ctx: PassContext, group: Group, recipe: Recipe) -> InsertTransform:
        linears = [ctx.plan.linear(name) for name in group.linears]
        weights = torch.cat([ctx.parameter(x.parameter).float().movedim(x.in_axis, -1) for x in linears])
        scale = self._smoothing(group, weights, recipe)
        if scale is not None:
            weights = weights * scale
        sizes = factors_of(linears[0], folded=recipe.transform.folded)
        generator = ctx.generator(group.name)
        kind: Literal["hadamard", "kronecker"] = "hadamard" if recipe.transform.kind == "hadamard" else "kronecker"
        if kind == "hadamard":
            left: Tensor | None = hadamard(sizes.n1, generator=generator)
            right = None if sizes.right_folded else hadamard(sizes.n2, generator=generator)
        else:
            fit = fit_okt(
                weights,
                n1=sizes.n1,
                n2=sizes.n2,
                generator=generator,
                iterations=recipe.transform.iterations,
                soft=recipe.transform.soft,
                start=recipe.transform.start,
                fit_right=not sizes.right_folded,
            )
            left, right = fit.left, fit.right
        members = tuple((x.name, x.in_axis) for x in linears)
        return InsertTransform(members, None if scale is None else 1 / scale, left, right, kind)

    def _smoothing(self, group: Group, weights: Tensor, recipe: Recipe) -> Tensor | None:
        if recipe.smoothing.exponent == 0 or group.name not in self.x_max:
            return None
        x_max = self.x_max[group.name]
        return smoothing_scale(x_max, weights.abs().amax(0), exponent=recipe.smoothing.exponent)


def skip_reason(linear: Linear, recipe: Recipe) -> str:
    """Return why a linear needs no online transform under a recipe, or ""."""
    if recipe.transform.kind == "none":
        return "the recipe does not rotate"
    bases = {leaf.basis for leaf in linear.input.leaves() if leaf.size > 1}
    if not recipe.transform.online:
        return "the recipe rotates only where it folds"
    if not recipe.transform.folded:
        return ""
    in_residual = bases == {RESIDUAL}
    if in_residual and recipe.residual == "none":
        return "the recipe leaves the residual stream's readers in their own basis"
    if linear.decision == "folded" and not (in_residual and recipe.residual == "online"):
        return "its input already comes rotated"
    return ""


def factors_of(linear: Linear, *, folded: bool = True) -> Factors:
    """Return the Kronecker factors of a linear's input: across heads where a head's own factor is folded.

    folded: whether the recipe folds rotations at all.
    """
    *outer, last = [leaf for leaf in linear.input.leaves() if leaf.size > 1]
    heads_only = folded and linear.decision == "partial" and linear.input.kind == "product"
    if heads_only and last.basis and outer and not any(leaf.basis for leaf in outer):
        return Factors(linear.in_features // last.size, last.size, right_folded=True)
    n1, n2 = factor_pair(linear.in_features)
    return Factors(n1, n2, right_folded=False)

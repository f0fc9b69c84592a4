"""InsertOnline: an online change of basis before the linears whose input cannot be rotated for free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bwla_compiler.cost.devices import DEVICES
from bwla_compiler.cost.factors import hadamard_factors, kronecker_factors
from bwla_compiler.cost.transforms import Choice, choose_transform
from bwla_compiler.graph.plan import Group, Linear
from bwla_compiler.numerics.kronecker import apply_kronecker, hadamard, random_signs, signed_hadamard
from bwla_compiler.numerics.okt import fit_okt
from bwla_compiler.numerics.smoothing import smoothing_scale
from bwla_compiler.passes.base import InsertTransform, PassContext, PassReport
from bwla_compiler.passes.fold_rotations import RESIDUAL
from bwla_compiler.recipe import Recipe
from bwla_compiler.spec import LinearSpec, TransformSpec


@dataclass(frozen=True)
class Factors:
    """Sizes of the Kronecker factors n1 x n2 of a group's input.

    right_folded: the right one is already in the weights before it; signed: it is to be a Hadamard matrix behind signs.
    """

    n1: int
    n2: int
    right_folded: bool = False
    signed: bool = False


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
            recipe = ctx.own[first.name]
            if recipe is None:
                report.skip(group.name, "an override keeps it as it is")
            elif reason := skip_reason(first, recipe):
                report.skip(group.name, reason)
            else:
                self._insert(ctx, report, group, recipe)
        return report

    def _insert(self, ctx: PassContext, report: PassReport, group: Group, recipe: Recipe) -> None:
        linears = [ctx.plan.linear(name) for name in group.linears]
        smoothed = recipe.smoothing.exponent != 0 and group.name in self.x_max
        choice = planned_transform(linears, recipe, scaled=smoothed)
        if choice.reason:
            report.skip(group.name, choice.reason)
        if choice.transform.online:
            report.change(group.name, self._fit(ctx, group, recipe, choice.transform))

    def _fit(self, ctx: PassContext, group: Group, recipe: Recipe, wanted: TransformSpec) -> InsertTransform:
        linears = [ctx.plan.linear(name) for name in group.linears]
        weights = torch.cat([_rows(ctx, x) for x in linears])
        scale = self._smoothing(group, weights, recipe)
        if scale is not None:
            weights = weights * scale
        generator = ctx.generator(group.name)
        kind: Literal["hadamard", "kronecker"] = "hadamard" if wanted.kind == "hadamard" else "kronecker"
        signs = random_signs(wanted.n2, generator=generator) / wanted.n2**0.5 if wanted.signed else None
        if kind == "hadamard":
            left = hadamard(wanted.n1, generator=generator) if wanted.left else None
            right = hadamard(wanted.n2, generator=generator) if wanted.right and signs is None else signs
        else:
            fit = fit_okt(
                weights if signs is None else apply_kronecker(weights, None, signed_hadamard(signs)),
                n1=wanted.n1,
                n2=wanted.n2,
                generator=generator,
                iterations=recipe.transform.iterations,
                soft=recipe.transform.soft,
                start=recipe.transform.start,
                fit_right=wanted.right and signs is None,
            )
            left, right = fit.left, fit.right if signs is None else signs
        members = tuple((x.name, x.in_axis) for x in linears)
        return InsertTransform(members, None if scale is None else 1 / scale, left, right, kind)

    def _smoothing(self, group: Group, weights: Tensor, recipe: Recipe) -> Tensor | None:
        if recipe.smoothing.exponent == 0 or group.name not in self.x_max:
            return None
        x_max = self.x_max[group.name]
        return smoothing_scale(x_max, weights.abs().amax(0), exponent=recipe.smoothing.exponent)


EXPERT_ROWS = 16384
"""Rows of experts' weights that a transform is fitted to, at most: evenly many of each expert."""


def _rows(ctx: PassContext, linear: Linear) -> Tensor:
    """Return a linear's weight [out, in] float32, or of experts as many rows as a fit needs."""
    weight = ctx.parameter(linear.parameter).movedim(linear.in_axis, -1)
    if not linear.experts:
        return weight.float()
    stride = -(-linear.experts * linear.out_features // EXPERT_ROWS)
    return weight.flatten(0, 1)[::stride].float()


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


def planned_transform(linears: Sequence[Linear], recipe: Recipe, *, scaled: bool) -> Choice:
    """Return the online transform of linears that share an input, as far as the recipe's budget goes.

    scaled: whether a diagonal comes first. The share of time is modelled without the low-rank pair.
    """
    sizes = factors_of(linears[0], recipe)
    kind: Literal["hadamard", "kronecker"] = "hadamard" if recipe.transform.kind == "hadamard" else "kronecker"
    spec = LinearSpec(
        linears[0].in_features,
        tuple(x.out_features for x in linears),
        planes=recipe.weights.n_planes,
        transform=TransformSpec(kind, sizes.n1, sizes.n2, True, not sizes.right_folded, scaled, sizes.signed),
        activation_bits=recipe.activations.bits,
    )
    return choose_transform(spec, budget=recipe.transform.budget, device=DEVICES[recipe.transform.device])


def factors_of(linear: Linear, recipe: Recipe) -> Factors:
    """Return the Kronecker factors of a linear's input: across heads where a head's own factor is folded."""
    *outer, last = [leaf for leaf in linear.input.leaves() if leaf.size > 1]
    heads_only = recipe.transform.folded and linear.decision == "partial" and linear.input.kind == "product"
    if heads_only and last.basis and outer and not any(leaf.basis for leaf in outer):
        return Factors(linear.in_features // last.size, last.size, right_folded=True)
    return whole_factors(linear.in_features, recipe)


def whole_factors(n: int, recipe: Recipe) -> Factors:
    """Return the Kronecker factors that turn all of n channels online."""
    by_additions = recipe.transform.kind == "okt" and recipe.transform.right == "hadamard"
    if by_additions and (sizes := hadamard_factors(n)):
        return Factors(*sizes, signed=True)
    return Factors(*kronecker_factors(n))

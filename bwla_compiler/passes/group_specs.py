"""Specs of a model's groups: of a packed one as it is, of a float one as quantizing it by a recipe would make them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from bwla_compiler.graph.plan import Group, Linear, Plan
from bwla_compiler.passes.fold_norms import FoldNorms
from bwla_compiler.passes.insert_online import planned_transform, skip_reason
from bwla_compiler.passes.own_recipes import OwnRecipes, own_recipes
from bwla_compiler.passes.pipeline import folding_passes
from bwla_compiler.passes.quantize_ends import head_names
from bwla_compiler.recipe import Recipe
from bwla_compiler.runtime.modules import PackedLinear
from bwla_compiler.spec import LinearSpec, TransformSpec

NamedSpec = tuple[tuple[str, ...], LinearSpec]
"""Names of the linears that share an input and a format, and the spec of all of them."""


def _whole(spec: LinearSpec) -> LinearSpec:
    """Return a spec whose factors cover the input: a transform of one factor alone does not know the other's size."""
    t = spec.transform
    if not (t.left or t.right) or t.n1 * t.n2 == spec.in_features:
        return spec
    n1, n2 = (t.n1, spec.in_features // t.n1) if t.left else (spec.in_features // t.n2, t.n2)
    return dataclasses.replace(spec, transform=dataclasses.replace(t, n1=n1, n2=n2))


def packed_specs(model: nn.Module) -> list[NamedSpec]:
    """Return the specs of a packed model by the groups of the plan in its config; alone without one.

    Empty where nothing is packed.
    """
    specs = {name: _whole(m.spec) for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    saved: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    plan = getattr(saved, "plan", None)
    grouped = [g.linears for g in Plan.from_dict(plan).groups] if plan else []
    named = {name for names in grouped for name in names}
    rest = [(name,) for name in specs if name not in named]
    together = [tuple(n for n in names if n in specs) for names in grouped]
    return _joined([names for names in (*together, *rest) if names], specs)


def _joined(groups: Sequence[tuple[str, ...]], specs: dict[str, LinearSpec]) -> list[NamedSpec]:
    """Return groups with the spec of all members, split where members differ in more than their outputs."""
    found = []
    for names in groups:
        alike: dict[LinearSpec, list[str]] = {}
        for name in names:
            alike.setdefault(dataclasses.replace(specs[name], out_features=()), []).append(name)
        for spec, members in alike.items():
            outs = tuple(out for name in members for out in specs[name].out_features)
            found.append((tuple(members), dataclasses.replace(spec, out_features=outs)))
    return found


def planned_specs(model: nn.Module, plan: Plan, recipe: Recipe) -> list[NamedSpec]:
    """Return the specs that quantizing a float model by a recipe would give."""
    recipes = own_recipes(plan, recipe)
    heads = set(head_names(model, plan))
    shifted = shifted_linears(plan, recipe)
    specs: dict[str, LinearSpec] = {}
    groups = [g for g in plan.groups if not heads.intersection(g.linears)]
    for group in groups:
        transform = _transform(group, plan, recipes, calibrated=recipe.needs_calibration)
        for name in group.linears:
            own = recipes[name]
            if own is not None:
                specs[name] = _float_spec(plan.linear(name), own, transform, _hidden(model), name in shifted)
    return _joined([names for g in groups if (names := tuple(n for n in g.linears if n in specs))], specs)


def shifted_linears(plan: Plan, recipe: Recipe) -> set[str]:
    """Return the linears that get a bias since a norm's shift is folded into them."""
    if not any(isinstance(step, FoldNorms) for step in folding_passes(recipe)):
        return set()
    return {name for norm in plan.norms if norm.shift is not None for name in norm.absorbed_by}


def _hidden(model: nn.Module) -> int:
    return int(getattr(getattr(model, "config", None), "hidden_size", 0) or 0)


def _transform(group: Group, plan: Plan, recipes: OwnRecipes, *, calibrated: bool) -> TransformSpec:
    """Return the online change of basis that recipes give a group, as InsertOnline would fit it."""
    linears = [plan.linear(name) for name in group.linears]
    own = recipes[linears[0].name]
    if own is None or any(recipes[name] is None for name in group.linears) or skip_reason(linears[0], own):
        return TransformSpec()
    scaled = own.smoothing.exponent != 0 and calibrated
    return planned_transform(linears, own, scaled=scaled).transform


def _float_spec(linear: Linear, recipe: Recipe, transform: TransformSpec, hidden: int, shifted: bool) -> LinearSpec:
    paper = recipe.signs.method == "paper"  # its pair carries the row means too
    if linear.experts:
        hidden = min(hidden or linear.in_features, linear.in_features, linear.out_features)
    fitted = recipe.signs.method == "descent" or paper
    rank = recipe.psp.rank_for(linear.in_features, linear.out_features, hidden=hidden) if fitted else 0
    return LinearSpec(
        in_features=linear.in_features,
        out_features=(linear.out_features,),
        planes=recipe.weights.n_planes,
        scale_kind="row+column" if paper else recipe.weights.scales,
        rank=rank + paper,
        transform=transform,
        activation_bits=recipe.activations.bits,
        bias=linear.bias is not None or shifted,
    )

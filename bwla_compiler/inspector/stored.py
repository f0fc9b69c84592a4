"""The formats of a model's linears: by a recipe for a float model, as they are in a packed one."""

from torch import nn

from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.formats import Format, transform_text
from bwla_compiler.numerics.bits import claimed_bits
from bwla_compiler.passes.group_specs import NamedSpec, packed_specs, planned_specs
from bwla_compiler.passes.insert_online import planned_transform, skip_reason
from bwla_compiler.passes.own_recipes import own_recipes
from bwla_compiler.recipe import Recipe


def planned_formats(model: nn.Module, plan: Plan, recipe: Recipe) -> dict[str, Format]:
    """Return the formats, by linear, that quantizing a float model by a recipe would give."""
    return _formats(planned_specs(model, plan, recipe), _transform_reasons(plan, recipe))


def packed_formats(model: nn.Module) -> dict[str, Format]:
    """Return the formats, by linear, that a packed model has."""
    return _formats(packed_specs(model), {})


def _formats(specs: list[NamedSpec], reasons: dict[str, str]) -> dict[str, Format]:
    found = {}
    for names, spec in specs:
        bits = float(f"{claimed_bits(spec):.5g}")
        for name in names:
            found[name] = Format(
                planes=spec.planes,
                scales=spec.scale_kind,
                rank=spec.rank,
                activation_bits=spec.activation_bits,
                bits=bits,
                transform=transform_text(spec),
                reason=reasons.get(name, ""),
            )
    return found


def _transform_reasons(plan: Plan, recipe: Recipe) -> dict[str, str]:
    recipes, found = own_recipes(plan, recipe), {}
    for group in plan.groups:
        linears = [plan.linear(name) for name in group.linears]
        own = recipes[linears[0].name]
        if own is None:
            reason = "an override keeps it as it is"
        else:
            scaled = own.smoothing.exponent != 0 and recipe.needs_calibration
            reason = skip_reason(linears[0], own) or planned_transform(linears, own, scaled=scaled).reason
        found.update(dict.fromkeys(group.linears, reason))
    return found

"""How each linear is stored and run: by a recipe for a float model, as it is in a packed one."""

from dataclasses import dataclass

from torch import nn

from bwla_compiler.graph.plan import Plan
from bwla_compiler.numerics.bits import claimed_bits
from bwla_compiler.passes.group_specs import NamedSpec, packed_specs, planned_specs
from bwla_compiler.passes.insert_online import planned_transform, skip_reason
from bwla_compiler.recipe import Recipe
from bwla_compiler.spec import LinearSpec


@dataclass(frozen=True)
class Format:
    """The format of one linear. bits: by formula, of its group, a weight. transform: at run time, "" for none.

    reason: why there is no transform, or not the one that the recipe asks for; "" where there is nothing to explain.
    """

    planes: int
    scales: str
    rank: int
    activation_bits: int
    bits: float
    transform: str = ""
    reason: str = ""


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


def transform_text(spec: LinearSpec) -> str:
    """Return an online transform in words, "" for none: "scaling, kronecker 16 x 24", "hadamard 1[128] x 32"."""
    t = spec.transform
    factors = " x ".join(str(n) if there else f"1[{n}]" for n, there in ((t.n1, t.left), (t.n2, t.right)))
    turning = [f"{t.kind} {factors}"] if t.left or t.right else []
    return ", ".join([*(["scaling"] if t.scaled else []), *turning])


def _transform_reasons(plan: Plan, recipe: Recipe) -> dict[str, str]:
    found = {}
    for group in plan.groups:
        linears = [plan.linear(name) for name in group.linears]
        own = recipe.override_for(linears[0].name)
        if own is None:
            reason = "an override keeps it as it is"
        else:
            scaled = own.smoothing.exponent != 0 and recipe.needs_calibration
            reason = skip_reason(linears[0], own) or planned_transform(linears, own, scaled=scaled).reason
        found.update(dict.fromkeys(group.linears, reason))
    return found

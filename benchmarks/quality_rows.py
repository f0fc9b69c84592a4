"""The rows of the quality table: recipes with settings, and what a mean number of binary planes asks of each linear."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bwla_compiler.graph.plan import Linear, Plan
from bwla_compiler.recipe import Recipe, load_recipe
from bwla_compiler.spec import END_GROUPS


@dataclass(frozen=True)
class Row:
    """A recipe with settings.

    table: "as published", "fair" (a baseline with our help), "ours"; of the fair table, "fair" or "fair, tuned".
    planes: binary planes a weight, a mean where it is no whole number (see `recipe_for`).
    """

    way: str
    recipe: str
    table: str
    settings: dict[str, Any] = field(default_factory=dict)
    planes: float = 1.0


HELP = {
    "transform.kind": "hadamard",
    "residual": "folded",
    "smoothing.exponent": 0.5,
    "target.drift": True,
    "signs.damping": 0.2,
}
"""What a baseline can take of ours: rotations and smoothing before it, the drift-corrected target, the damping."""

TUNED = {f"tuning.{key}": getattr(load_recipe("bwla-w1a6").tuning, key) for key in ("steps", "signs")}
"""The last help, for weights that are packed."""

ROWS = (
    Row("rounding", "rtn", "as published"),
    Row("Hadamard + rounding", "hadamard-rtn", "as published"),
    Row("GPTQ", "gptq", "as published"),
    Row("ARB row + column", "arb-rc", "as published"),
    Row("BiLLM-like", "billm-like", "as published"),
    Row("ARB-like", "arb-like", "as published"),
    Row("BWLA, the paper's reading", "bwla-paper", "as published"),
    Row("rounding", "rtn", "fair", HELP | TUNED),
    Row("GPTQ", "gptq", "fair", HELP | TUNED),
    Row("GPTQ, 2 planes", "gptq", "fair", HELP | TUNED | {"weights.planes": 2}),
    Row("BiLLM-like", "billm-like", "fair", HELP),
    Row("ARB-like", "arb-like", "fair", HELP),
    Row("ours, folded alone", "bwla-folded", "ours"),
    Row("ours, no pair", "bwla-w1a6", "ours", {"psp.hidden_over": 0}),
    Row("ours", "bwla-w1a6", "ours"),
    Row("ours, not tuned", "bwla-w1a6", "ours", {"tuning.steps": 0}),
    Row("ours, online residual", "bwla-w1a6", "ours", {"residual": "online"}),
    Row("ours, rank 12", "bwla-w1a6", "ours", {"psp.rank": 12}),
    Row("ours, 2 planes, no pair", "bwla-w1a6", "ours", {"psp.hidden_over": 0, "weights.planes": 2}),
    Row("ours, 2 planes", "bwla-w1a6", "ours", {"weights.planes": 2}),
)
ALONE = {"overrides": [{"pattern": "*.layers.*", "keep": True}]}
"""Linears of the blocks stay floats."""
ENDS = tuple(
    Row(f"{name}, {what}", recipe, "ends", settings | more)
    for what, recipe, more in (
        ("float linears", "hadamard-rtn", ALONE),
        ("ours, not tuned", "bwla-w1a6", {"tuning.steps": 0}),
    )
    for name, settings in (
        ("int8", {"head.bits": 8}),
        *((f"int4 by {size}", {"head.bits": 4, "head.group_size": size}) for size in END_GROUPS),
    )
)
"""Embedding and head by bits and columns of a scale, beside linears that are otherwise the same."""
QUICK = ("rounding", "GPTQ", "BiLLM-like", "ours, no pair", "ours")
"""Rows of a short run."""

LEVELS = (1.0, 1.18, 1.5, 2.0, 2.4)
"""Mean planes of the fair table: about 1.1, 1.3, 1.6, 2.1 and 2.5 true bits on the embedded model."""


def fair_rows() -> tuple[Row, ...]:
    """Return rows that differ in how weights become bits alone: rotation (ours), smoothing and target are the same.

    First all that are not tuned, among them those that no packed format holds and that cannot be; then the best of the
    packed ones, tuned alike.
    """
    same = HELP | {"transform.kind": "okt", "tuning.steps": 0}
    ours = {"psp.hidden_over": 0, "tuning.steps": 0}
    ways = (("rounding", "rtn", same), ("GPTQ", "gptq", same), ("ours", "bwla-w1a6", ours))
    rows = [Row(_way(way, level), recipe, "fair", how, level) for level in LEVELS for way, recipe, how in ways]
    rows += [
        Row("ARB row + column", "arb-rc", "fair", same),
        Row("ours, with pair", "bwla-w1a6", "fair", {"tuning.steps": 0}),
        Row("BiLLM-like", "billm-like", "fair", same),
        Row("ARB-like", "arb-like", "fair", same),
    ]
    tuned = (("rounding", "rtn", same | TUNED), ("GPTQ", "gptq", same | TUNED), ("ours", "bwla-w1a6", ours | TUNED))
    rows += [Row(_way(way, level), r, "fair, tuned", how, level) for level in LEVELS for way, r, how in tuned]
    return (*rows, Row("ours, with pair", "bwla-w1a6", "fair, tuned"))


def recipe_for(row: Row, plan: Plan) -> Recipe:
    """Return a row's recipe.

    Where its planes are no whole number, linears take one plane more until the mean is reached: those that write the
    residual stream first, then the others, in the model's order. The rule is the same for every way.
    """
    whole = int(row.planes)
    if row.planes == 1:
        return load_recipe(row.recipe, row.settings)
    more = _first_linears([x for x in plan.linears if x.block], share=row.planes - whole)
    overrides = [{"pattern": x.name, "set": {"weights.planes": whole + 1}} for x in more]
    return load_recipe(row.recipe, row.settings | {"weights.planes": whole, "overrides": overrides})


def _first_linears(linears: Sequence[Linear], *, share: float) -> list[Linear]:
    """Return linears that hold about this share of all weights."""
    order = sorted(linears, key=lambda x: not x.writes_residual)  # stable: in the model's order otherwise
    wanted, taken, found = share * sum(x.n_weights for x in linears), 0, []
    for linear in order:
        if taken + linear.n_weights / 2 <= wanted:
            found.append(linear)
            taken += linear.n_weights
    return found


def _way(way: str, planes: float) -> str:
    return way if planes == 1 else f"{way}, {planes:g} planes"

"""The rows of the quality table: recipes with settings."""

from dataclasses import dataclass, field, replace
from typing import Any

from bwla_compiler.recipe import load_recipe
from bwla_compiler.spec import END_GROUPS


@dataclass(frozen=True)
class Row:
    """A recipe with settings.

    table: "as published", "fair" (a baseline with our help), "ours"; of the fair table, "fair" or "fair, tuned".
    """

    way: str
    recipe: str
    table: str
    settings: dict[str, Any] = field(default_factory=dict)


HELP = {
    "transform.kind": "hadamard",
    "residual": "folded",
    "smoothing.exponent": 0.5,
    "target.drift": True,
    "signs.damping": 0.2,
}
"""What a baseline can take of ours: rotations and smoothing before it, the drift-corrected target, the damping."""

FAST = {f"tuning.{key}": rate for key, rate in (
    ("scales", 0.01), ("pairs", 0.03), ("gains", 0.003), ("diagonals", 0.003), ("biases", 0.003)
)}  # fmt: skip
"""About three times the default rates."""

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
    Row("ours, 1.18 planes, no pair", "bwla-mixed-a6", "ours"),
    Row("ours, not tuned", "bwla-w1a6", "ours", {"tuning.steps": 0}),
    Row("ours, 32 steps", "bwla-w1a6", "ours", {"tuning.steps": 32}),
    Row("ours, 288 steps", "bwla-w1a6", "ours", {"tuning.steps": 288}),
    Row("ours, thrice the rates", "bwla-w1a6", "ours", FAST),
    Row("ours, 288 steps, thrice the rates", "bwla-w1a6", "ours", FAST | {"tuning.steps": 288}),
    Row("ours, both factors fitted", "bwla-w1a6", "ours", {"transform.right": "fitted"}),
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
"""Mean `weights.planes` of the fair table: about 1.1, 1.3, 1.6, 2.1 and 2.5 true bits on the embedded model."""


def fair_rows() -> tuple[Row, ...]:
    """Return rows that differ in how weights become bits alone: rotation (ours), smoothing and target are the same.

    First all that are not tuned, among them those that no packed format holds and that cannot be; then the best of the
    packed ones, tuned alike.
    """
    same = HELP | {"transform.kind": "okt", "tuning.steps": 0}
    ours = {"psp.hidden_over": 0, "tuning.steps": 0}
    ways = (("rounding", "rtn", same), ("GPTQ", "gptq", same), ("ours", "bwla-w1a6", ours))
    rows = [_at(level, Row(way, recipe, "fair", how)) for level in LEVELS for way, recipe, how in ways]
    rows += [
        Row("ARB row + column", "arb-rc", "fair", same),
        Row("ours, with pair", "bwla-w1a6", "fair", {"tuning.steps": 0}),
        Row("BiLLM-like", "billm-like", "fair", same),
        Row("ARB-like", "arb-like", "fair", same),
    ]
    tuned = (("rounding", "rtn", same | TUNED), ("GPTQ", "gptq", same | TUNED), ("ours", "bwla-w1a6", ours | TUNED))
    rows += [_at(level, Row(way, recipe, "fair, tuned", how)) for level in LEVELS for way, recipe, how in tuned]
    return (*rows, Row("ours, with pair", "bwla-w1a6", "fair, tuned"))


def _at(planes: float, row: Row) -> Row:
    """Return a row with so many planes a weight, a mean where it is no whole number; as it is for one."""
    if planes == 1:
        return row
    return replace(row, way=f"{row.way}, {planes:g} planes", settings=row.settings | {"weights.planes": planes})

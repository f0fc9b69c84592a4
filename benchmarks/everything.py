"""What `make bench` measures: each kind within its share of the time, those whose cost is known first."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import demo_table, kernels, models, quality, quantize
from benchmarks.budget import Budget
from benchmarks.record import Row

Progress = Callable[[str, int, int], None]
Part = tuple[str, list[Row], str]

WIDE: dict[str, Any] = {
    "model": str(Path(__file__).with_name("configs") / "qwen3-0.6b.json"),
    "layers": 2,
    "vocab": 8192,
}
"""A model of a width at which bytes of weights decide; two blocks compile in the time that there is."""

TUNING = "tuning.steps=0"
QUALITY_ROWS = ("ours", "rounding")
RESERVE = 0.1
"""Of the time: for the plots, and for the last case of a kind, which may take longer than those before it."""


def measure_everything(progress: Progress, *, budget: Budget) -> Iterator[Part]:
    """Yield (kind, rows, label of the results' file) as each is done; a budget of inf measures everything whole.

    Each kind that can be cut short gets a share of what is left when it begins.
    """
    spendable = budget.part(1 - RESERVE)
    yield "demo", demo_table.measure(progress), ""
    yield "quantize", quantize.measure(progress, changes=(TUNING,)), ""
    yield "models", models.measure(progress, budget=spendable.part(0.35)), ""
    yield "models", models.measure(progress, **WIDE, budget=spendable.part(0.5)), ""
    yield "kernels", kernels.measure(progress, budget=spendable.part(0.6)), ""
    for way in QUALITY_ROWS:
        if spendable.left > 0:
            rows = quality.measure(progress, ways=(way,), budget=spendable)
            yield "quality", rows, f"quality-{rows[0]['model']}"

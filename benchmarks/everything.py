"""What `make bench` measures: each kind within its share of the time, those whose cost is known first."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import demo_table, kernels, models, quality, quantize
from benchmarks.budget import Budget
from benchmarks.kernel_peers import SHORT
from benchmarks.record import Row

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

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


@dataclass(frozen=True)
class Part:
    """What became of one kind. label: of its file of results. failed: what failed and how, "" where it was measured."""

    kind: str
    rows: list[Row]
    label: str = ""
    failed: str = ""


def measure_everything(progress: Progress, *, budget: Budget) -> Iterator[Part]:
    """Yield each part as soon as it is done; a budget of inf measures everything whole.

    Each kind that can be cut short gets a share of what is left when it begins. One that raises is a part without rows,
    and those after it are measured all the same.
    """
    spendable = budget.part(1 - RESERVE)
    yield _part("demo", "", partial(demo_table.measure, progress))
    yield _part("quantize", "", partial(quantize.measure, progress, changes=(TUNING,)))
    yield _part("kernels", "", partial(kernels.measure, progress, peers=SHORT, budget=spendable.part(0.25)))
    wide = partial(models.measure, progress, **WIDE, budget=spendable.part(0.45))
    yield _part("models", Path(WIDE["model"]).name, wide)
    yield _part("models", "demo:", partial(models.measure, progress, budget=spendable.part(0.6)))
    for way in QUALITY_ROWS:
        if spendable.left > 0:
            yield _part("quality", way, partial(quality.measure, progress, ways=(way,), budget=spendable))


def _part(kind: str, what: str, measure: Callable[[], list[Row]]) -> Part:
    """Return the part that `measure` gives, or the one that says what it raised. what: was measured, for that."""
    try:
        rows = measure()
        return Part(kind, rows, f"quality-{rows[0]['model']}" if kind == "quality" else "")
    except Exception as error:  # of whatever kind: what is measured before and after it stands
        return Part(kind, [], failed=failure(f"{kind} {what}".strip(), error))


def failure(name: str, error: Exception) -> str:
    """Return what failed and how, in one line; the traceback goes to the log."""
    log.info("%s failed", name, exc_info=error)
    said = " ".join(str(error).split())
    return f"{name} ({type(error).__name__}{': ' if said else ''}{said})"

"""python -m benchmarks [NAME ...]: run measurements, show them as tables, append them to benchmarks/results."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import compile_time, kernels, quality, text
from benchmarks.record import RESULTS, latest, record
from bwla_compiler.inspector.progress import ProgressBars

Measure = Callable[[Callable[[str, int, int], None], argparse.Namespace], list[dict[str, Any]]]
MEASUREMENTS: dict[str, Measure] = {
    "compile_time": lambda progress, asked: compile_time.measure(progress),
    "kernels": lambda progress, asked: kernels.measure(progress, quick=asked.quick),
    "quality": lambda progress, asked: quality.measure(
        progress, seed=asked.seed, quick=asked.quick, outliers=asked.outliers, ways=asked.row
    ),
    "text": lambda progress, asked: text.measure(progress),
}


def main(arguments: list[str]) -> int:
    """Run the measurements named, or all; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASUREMENTS)}; all by default")
    parser.add_argument("--seed", type=int, help="quality: a fresh model and split; else the embedded model")
    parser.add_argument("--quick", action="store_true", help="quality: a few rows on less text; kernels: two shapes")
    parser.add_argument("--outliers", action="store_true", help="quality: the model with heavy-tailed activations")
    parser.add_argument(
        "--row", action="append", default=[], metavar="WAY", help="quality: this row alone (repeatable)"
    )
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.names if name not in MEASUREMENTS]
    if unknown:
        print(f"error: no benchmark is called {unknown[0]!r}; there are: {', '.join(MEASUREMENTS)}", file=sys.stderr)
        return 2
    console = Console()
    for name in asked.names or MEASUREMENTS:
        with ProgressBars(console) as progress:
            rows = MEASUREMENTS[name](progress, asked)
        console.print(_table(name, rows))
        label = f"{name}-{rows[0]['model']}" if name == "quality" else name
        path = record(label, list(rows))
        console.print(f"written to {path}")
        if name == "quality":
            drawn = quality.plot(latest(path, by=("way", "table")), RESULTS / f"{label}.svg")
            console.print(f"drawn to {drawn}" if drawn else "not drawn: pip install matplotlib")
    return 0


def _table(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=name)
    shown = [column for column in rows[0] if column not in ("settings", "model", "seed", "fp_perplexity")]
    for column in shown:
        table.add_column(column.replace("_", " "), justify="left" if column in ("way", "table") else "right")
    for row in rows:
        cells = (row[column] for column in shown)
        table.add_row(*(f"{v:.3f}".rstrip("0").rstrip(".") if isinstance(v, float) else str(v) for v in cells))
    return table


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

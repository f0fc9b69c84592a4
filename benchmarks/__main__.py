"""python -m benchmarks [NAME ...]: run measurements, show them as tables, append them to benchmarks/results."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import compile_time, kernels, quality, raw
from benchmarks.quality_plot import plot
from benchmarks.record import latest, record
from bwla_compiler.inspector.progress import ProgressBars

Measure = Callable[[Callable[[str, int, int], None], argparse.Namespace], Iterable[dict[str, Any]]]
MEASUREMENTS: dict[str, Measure] = {
    "compile_time": lambda progress, asked: compile_time.measure(progress),
    "kernels": lambda progress, asked: kernels.measure(progress, quick=asked.quick),
    "quality": lambda progress, asked: quality.measure(progress, _quality(asked)),
    "raw": lambda progress, asked: raw.measure(progress, quick=asked.quick, outliers=asked.outliers),
}


def main(arguments: list[str]) -> int:
    """Run the measurements named, or all; each row is written as soon as it is there. Return the exit code."""
    asked = _parser().parse_args(arguments)
    unknown = [name for name in asked.names if name not in MEASUREMENTS]
    if unknown:
        print(f"error: no benchmark is called {unknown[0]!r}; there are: {', '.join(MEASUREMENTS)}", file=sys.stderr)
        return 2
    console = Console()
    for name in asked.names or MEASUREMENTS:
        rows = []
        with ProgressBars(console) as progress:
            for row in MEASUREMENTS[name](progress, asked):
                rows.append(row)
                path = record(_label(name, row, asked), [row])
        console.print(_table(name, rows))
        console.print(f"written to {path}")
        if name == "quality" and not asked.fair:
            drawn = plot(latest(path, by=("way", "table")), path.with_suffix(".svg"), bits=quality.BITS)
            console.print(f"drawn to {drawn}" if drawn else "not drawn: pip install matplotlib")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASUREMENTS)}; all by default")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="quality: a few rows on less text; kernels: two shapes; raw: without Inductor's code",
    )
    parser.add_argument("--outliers", action="store_true", help="quality, raw: the model with heavy-tailed activations")
    of_quality = parser.add_argument_group("quality")
    of_quality.add_argument("--seed", type=int, help="a fresh model and split; else the embedded model")
    of_quality.add_argument("--adamw", action="store_true", help="a fresh model trained by AdamW, not by Muon")
    of_quality.add_argument("--model", type=Path, metavar="DIR", help="any causal LM in place of these")
    of_quality.add_argument("--tokens", type=Path, metavar="FILE", help="its text, or streams of ids train and test")
    of_quality.add_argument("--calibration-seed", type=int, help="of the calibration's draw and of the fit")
    of_quality.add_argument("--fair", action="store_true", help="same help for all, at equal true bits")
    of_quality.add_argument("--row", action="append", default=[], metavar="WAY", help="this row alone (repeatable)")
    return parser


def _quality(asked: argparse.Namespace) -> quality.Asked:
    return quality.Asked(
        seed=asked.seed,
        adamw=asked.adamw,
        outliers=asked.outliers,
        model=asked.model,
        tokens=asked.tokens,
        calibration_seed=asked.calibration_seed,
        ways=asked.row,
        fair=asked.fair,
        quick=asked.quick,
    )


def _label(name: str, row: dict[str, Any], asked: argparse.Namespace) -> str:
    """Return the name of the file that a row is written to."""
    if name != "quality":
        return name
    return "quality-fair" if asked.fair else f"quality-{row['model']}"


def _table(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=name)
    shown = [column for column in rows[0] if column not in ("settings", "recipe", "calibration_seed")]
    for column in shown:
        table.add_column(column.replace("_", " "), justify="left" if column in ("way", "table", "model") else "right")
    for row in rows:
        cells = (row.get(column, "") for column in shown)
        table.add_row(*(f"{v:.3f}".rstrip("0").rstrip(".") if isinstance(v, float) else str(v) for v in cells))
    return table


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""python -m benchmarks [NAME ...]: run measurements, show them as tables, append them to benchmarks/results."""

import sys

from rich.console import Console
from rich.table import Table

from benchmarks import compile_time
from benchmarks.record import record
from bwla_compiler.inspector.progress import ProgressBars

MEASUREMENTS = {"compile_time": compile_time.measure}


def main(names: list[str]) -> int:
    """Run the measurements named, or all; return the exit code."""
    unknown = [name for name in names if name not in MEASUREMENTS]
    if unknown:
        print(f"error: no benchmark is called {unknown[0]!r}; there are: {', '.join(MEASUREMENTS)}", file=sys.stderr)
        return 2
    console = Console()
    for name in names or MEASUREMENTS:
        with ProgressBars(console) as progress:
            rows = MEASUREMENTS[name](progress)
        table = Table(title=name)
        for column in rows[0]:
            table.add_column(column.replace("_", " "), justify="left" if column == "way" else "right")
        for row in rows:
            table.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
        console.print(f"written to {record(name, list(rows))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

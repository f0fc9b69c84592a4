"""Markdown of results: tables whose best figures are bold whoever has them, and the line that says their source."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.record import Row, device

Cell = str | float | None


@dataclass(frozen=True)
class Column:
    """A column: its heading, whether less or more is better (0: neither), and decimals of its numbers."""

    heading: str
    better: int = 0
    decimals: int = 2
    left: bool = False


LESS, MORE = -1, 1


def number(value: float, decimals: int) -> str:
    """Return a number with so many decimals; from a thousand on without, its thousands marked."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{decimals}f}"


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, across: bool = False) -> str:
    """Return a Markdown table. The best number of a column that has a better end is bold; across: the best of a row.

    None is a dash. Texts are never compared.
    """
    shown = [[_text(cell, column) for cell, column in zip(row, columns, strict=True)] for row in rows]
    for i, j in _best(columns, rows, across=across):
        shown[i][j] = f"**{shown[i][j]}**"
    lines = [
        "| " + " | ".join(column.heading for column in columns) + " |",
        "|" + "|".join("---" if column.left else "---:" for column in columns) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in shown)])


def _text(cell: Cell, column: Column) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else number(cell, column.decimals)


def _best(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, across: bool) -> list[tuple[int, int]]:
    """Return the places of the best numbers, equals included, of each column or of each row."""
    ranked = [j for j, column in enumerate(columns) if column.better]
    places = [(i, j) for i in range(len(rows)) for j in ranked if not isinstance(rows[i][j], (str, type(None)))]
    groups: dict[int, list[tuple[int, int]]] = {}
    for i, j in places:
        groups.setdefault(i if across else j, []).append((i, j))
    found = []
    for group in groups.values():
        if len(group) > 1:
            # compared as they are shown: what prints alike is as good
            values = {(i, j): round(_value(rows[i][j]), columns[j].decimals) * columns[j].better for i, j in group}
            most = max(values.values())
            found += [place for place, value in values.items() if value == most]
    return found


def _value(cell: Cell) -> float:
    assert isinstance(cell, (int, float))
    return float(cell)


def source_line(rows: Sequence[Row]) -> str:
    """Return where rows are from: commands with commits and days, device, versions, and what else the machine did."""
    runs = dict.fromkeys(f"`{row['command']}` at {row['commit']}, {str(row['when'])[:10]}" for row in rows)
    commands = "; ".join(runs)
    versions = ", ".join(sorted({f"torch {row['torch']}, Python {row['python']}" for row in rows}))
    devices = "; ".join(sorted({device(row) for row in rows}))
    return f"{commands}. {devices}; {versions}; {noise_line(rows)}."


def noise_line(rows: Sequence[Row]) -> str:
    """Return the load average (and steal where it was seen) while rows were measured."""
    loads = [
        float(row[key]) for row in rows for key in ("load_before", "load_after", "load") if row.get(key) is not None
    ]
    steals = [float(row["steal"]) for row in rows if row.get("steal") is not None]
    said = f"load {min(loads):.1f} to {max(loads):.1f}" if loads else "load unknown"
    return said + (f", steal up to {max(steals):.1%}" if steals else "")


def missing_line(rows: Sequence[Row]) -> str:
    """Return one sentence on the ways that have no figures, with their reasons; "" where all have."""
    reasons = {
        str(row["way"]): next(str(row[key]) for key in ("missing", "refused", "failed") if key in row)
        for row in rows
        if {"missing", "refused", "failed"} & row.keys()
    }
    return f"Without figures: {'; '.join(f'{way} ({why})' for way, why in reasons.items())}." if reasons else ""


def peers_line(rows: Sequence[Row]) -> str:
    """Return the versions of the peers that ran, with what they were built for; "" where there are none."""
    found = dict.fromkeys(str(row["version"]) for row in rows if row.get("version"))
    return f"Peers: {'; '.join(found)}." if found else ""


def ending(rows: Sequence[Row]) -> str:
    """Return the lines that end a table: what has no figures, the peers, and where the rows are from."""
    return "\n\n".join(filter(None, [missing_line(rows), peers_line(rows), source_line(rows)]))

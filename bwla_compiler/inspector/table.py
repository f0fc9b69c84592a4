"""A table as plain data, which the terminal and the page both draw."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One text and its role: "" for plain, a decision's name, "best", or "quiet" (less important).

    note: a second figure, smaller, where there is room for it: on the page alone.
    """

    text: str
    role: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Columns (names that start with ">" are aligned right), rows of equal length, and a note below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.title}: ragged rows"


def row(*values: "Cell | str | float | int | None") -> tuple[Cell, ...]:
    """Return a row of cells; None becomes a dash, floats get three significant digits."""
    return tuple(v if isinstance(v, Cell) else Cell(number(v)) if not isinstance(v, str) else Cell(v) for v in values)


def number(value: float | int | None) -> str:
    """Return a number as people read it: 3 significant digits, thousands of four and more digits in full."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def fixed(value: float | None, digits: int = 2) -> str:
    """Return a perplexity or a rate with so many decimals; very large ones without."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def size(n_bytes: float) -> str:
    """Return bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def duration(seconds: float) -> str:
    """Return a time span with one fitting unit."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def best(values: Iterable[float | None]) -> float | None:
    """Return the smallest value that is there."""
    return min((v for v in values if v is not None), default=None)

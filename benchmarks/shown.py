"""Results and comparisons as tables of the terminal."""

from collections.abc import Sequence

from benchmarks.anchors import Anchor
from benchmarks.compare import Change
from benchmarks.record import Row
from benchmarks.step_profile import StepProfile
from bwla_compiler.inspector.table import Cell, Table, number, row

HIDDEN = {"settings", "steal", "load_before", "load_after", "seed", "spread", "source", "n_bytes", "version"}
KERNELS_SHOWN = 24


def rows_table(title: str, rows: Sequence[Row]) -> Table:
    """Return rows as they are: a column each, those that say nothing (one value for all rows) in the note."""
    columns = list(dict.fromkeys(name for found in rows for name in found if name not in HIDDEN))
    same = [name for name in columns if len(rows) > 1 and len({str(found.get(name)) for found in rows}) == 1]
    shown = [name for name in columns if name not in same]
    numeric = {name for name in shown if all(isinstance(r.get(name), (int, float, type(None))) for r in rows)}
    cells = tuple(tuple(_cell(found.get(name)) for name in shown) for found in rows)
    heads = tuple(f">{name.replace('_', ' ')}" if name in numeric else name.replace("_", " ") for name in shown)
    note = ", ".join(f"{name.replace('_', ' ')} {rows[0].get(name)}" for name in same)
    return Table(title, heads, cells, note)


def _cell(value: object) -> Cell:
    if value is None:
        return Cell("")
    return Cell(number(value) if isinstance(value, (int, float)) else str(value))


def changes_table(changes: Sequence[Change], *, every: bool) -> Table:
    """Return what became worse or better, or every change."""
    chosen = [c for c in changes if every or c.worse or c.better]
    words = {(True, False): Cell("worse", "partial"), (False, True): Cell("better", "folded")}
    cells = tuple(
        row(c.what, c.metric, c.old, c.new, f"{c.change:+.1%}", f"{c.noise:.1%}",
            words.get((c.worse, c.better), Cell("within the noise", "quiet")))
        for c in chosen
    )  # fmt: skip
    columns = ("row", "figure", ">old", ">new", ">change", ">noise", "verdict")
    note = f"{len(changes)} figures compared; change: with the peers' own change of the same rounds taken out"
    return Table("", columns, cells, note)


def profile_tables(found: StepProfile) -> tuple[Table, Table]:
    """Return a decode step by region, and by kernel."""
    total = found.profiled_us
    regions = tuple(row(region, us, f"{us / total:.1%}") for region, us in found.regions())
    note = f"a step takes {found.us:,.0f} us without the profiler, {total:,.0f} with it; shares are of the latter"
    by_region = Table(f"{found.way}: one decode step", ("region", ">us", ">share"), regions, note)
    dearest = tuple(
        row(k.name[:60], k.shapes[:60], k.calls, k.us, f"{k.us / total:.1%}") for k in found.kernels[:KERNELS_SHOWN]
    )
    return by_region, Table("By kernel", ("kernel", "shapes", ">calls", ">us", ">share"), dearest)


def anchors_table(known: Sequence[Anchor], *, wide: bool) -> Table:
    """Return the published figures, with the command that measures beside each where there is room for it."""
    columns = ["figure", "model", ">activations", ">bits", "counted", ">perplexity"]
    cells = []
    for a in known:
        cell: list[str | int] = [a.key, a.hub_id, a.activations, f"{a.bits:.2f}", a.counted, f"{a.perplexity:,.2f}"]
        cells.append(row(*cell, *([a.command()] if wide else [])))
    sources = "; ".join(dict.fromkeys(f"{a.table}: {a.source}" for a in known))
    note = f"WikiText-2 test split, context 2048; none measured here. {sources}. Each: bench quality --anchor FIGURE"
    return Table("Published figures", (*columns, *(["command"] if wide else [])), tuple(cells), note)

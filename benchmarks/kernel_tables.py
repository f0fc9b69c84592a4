"""Tables of kernels: linears and changes of basis by shape, tokens and threads.

A case is a linear, tokens and threads; its contenders took turns in one run, so that all of its row are of the last run
that measured it. A run that its budget cut short takes no case away that an earlier one has.
"""

from collections.abc import Sequence

from benchmarks.markdown import LESS, Cell, Column, ending, table
from benchmarks.record import Row, grouped, last_runs

CASE = ("linear", "tokens", "threads")
CEILING, TRANSFORM, PROLOGUE = "ceiling", "transform of", "prologue of"
"""What stands in a linear's place: what the machine allows, a change of basis of so many channels, and what a linear of
that name waits for."""

OURS = ("bwla A8", "bwla A6", "bwla A4")
READ = "pure read"


def timed_linears(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of linears that were timed, of the last run of each case."""
    return [row for row in _of_linears(rows) if "us" in row]


def _of_linears(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of linears, those too that say why a contender was not timed."""
    return last_runs([row for row in rows if "out" in row and not _is_other(row)], by=CASE)


def _timed_transforms(rows: Sequence[Row]) -> list[Row]:
    return last_runs([r for r in rows if "us" in r and _is_transform(r)], by=CASE)


def _is_transform(row: Row) -> bool:
    return str(row["linear"]).startswith(TRANSFORM)


def _is_other(row: Row) -> bool:
    return str(row["linear"]).startswith((TRANSFORM, PROLOGUE))


def kernels_table(rows: Sequence[Row]) -> str:
    """Return microseconds of linears by shape, tokens and threads; the fastest of a row is bold. "" for none."""
    linears = timed_linears(rows)
    if not linears:
        return ""
    ways = _ways(linears)
    columns = [
        Column("linear", left=True), Column("out x in"), Column("tokens"), Column("threads"),
        *(Column(way, LESS, 0) for way in ways), Column(READ, decimals=0), Column("best peer, times A6"),
    ]  # fmt: skip
    cells: list[list[Cell]] = []
    for key, found in _cases(linears):
        any_row = next(iter(found.values()))
        shape = f"{any_row['out']} x {any_row['in']}"
        times = [found[way]["us"] if way in found else None for way in (*ways, READ)]
        cells.append([key[0], shape, key[1], key[2], *times, _best_peer([*found.values()])])
    ceilings = last_runs([row for row in rows if row["linear"] == CEILING], by=("threads",))
    absent = [row for row in rows if not row["linear"] and not any(way.startswith(row["way"]) for way in ways)]
    absent += [{**row, "way": f"{row['way']}: {_said(row)}"} for row in _of_linears(rows) if "us" not in row]
    unit = "Microseconds a call, weights cold; median of the rounds."
    said = [unit, ceilings_sentence(ceilings), _left_out(rows, linears, transforms=False)]
    said.append(ending([*absent, *linears, *ceilings]))
    return "\n\n".join(filter(None, [table(columns, cells, across=True), *said]))


def _said(row: Row) -> str:
    return f"{row['linear']}, tokens {row['tokens']}, threads {row['threads']}"


def _ways(rows: Sequence[Row]) -> list[str]:
    """Return the columns of contenders: ours, then the others in the order of the rows."""
    seen = dict.fromkeys(row["way"] for row in rows)
    return [*(way for way in OURS if way in seen), *(way for way in seen if way not in OURS and way != READ)]


def _cases(rows: Sequence[Row]) -> list[tuple[tuple[str, str, str], dict[str, Row]]]:
    """Return (linear, tokens, threads) with its rows by way; linears in their order, threads and tokens rising."""
    found = grouped(rows, by=CASE)
    order = [*dict.fromkeys(linear for linear, _, _ in found)]
    return [
        ((linear, str(tokens), str(threads)), {row["way"]: row for row in found[linear, tokens, threads]})
        for linear, tokens, threads in sorted(found, key=lambda key: (key[2], key[1], order.index(key[0])))
    ]


def _best_peer(rows: Sequence[Row]) -> str | None:
    """Return the fastest peer with its time over ours of the same round, and the quartiles of that."""
    peers = [row for row in rows if not row["way"].startswith("bwla") and row["way"] != READ]
    if not peers:
        return None
    best = min(peers, key=lambda row: float(row["us"]))
    return f"{best['way']}: {best['times_ours']:.2f} ({best['times_low']:.2f}-{best['times_high']:.2f})"


def ceilings_sentence(ceilings: Sequence[Row]) -> str:
    """Return what the machine allows; "" where that was not measured."""
    said = []
    for row in ceilings:
        rate = f"{row['gb_per_second']:.1f} GB/s" if "gb_per_second" in row else f"{row['gmac_per_second']:,.0f} G/s"
        said.append(f"{row['way']} {rate} on {row['threads']}")
    return f"Ceilings by threads: {', '.join(said)}." if said else ""


def _left_out(rows: Sequence[Row], measured: Sequence[Row], *, transforms: bool) -> str:
    """Return which cases a budget left out that no run has measured; "" for none."""
    have = {tuple(row[name] for name in CASE) for row in measured}
    names: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        case = tuple(row.get(name) for name in CASE)
        if "missing" in row and row["linear"] and case not in have and _is_other(row) == transforms:
            found = names.setdefault((row["tokens"], row["threads"]), [])
            found += [row["linear"]] if row["linear"] not in found else []
    said = [f"{', '.join(found)} (tokens {m}, threads {n})" for (m, n), found in names.items()]
    return f"Left out, the time budget being spent: {'; '.join(said)}." if said else ""


def transforms_table(rows: Sequence[Row]) -> str:
    """Return microseconds of changes of basis by width, tokens and threads. "" for none."""
    transforms = _timed_transforms(rows)
    if not transforms:
        return ""
    ways = [*dict.fromkeys(row["way"] for row in transforms)]
    columns = [Column("channels"), Column("tokens"), Column("threads"), *(Column(way, LESS, 1) for way in ways)]
    cells: list[list[Cell]] = []
    for key, found in _cases(transforms):
        times = [found[way]["us"] if way in found else None for way in ways]
        cells.append([key[0].removeprefix(f"{TRANSFORM} "), key[1], key[2], *times])
    said = ["Microseconds a call.", _left_out(rows, transforms, transforms=True), ending(transforms)]
    return "\n\n".join(filter(None, [table(columns, cells, across=True), *said]))


def prologues_table(rows: Sequence[Row]) -> str:
    """Return what linears wait for at one token, and its share of them. "" for none."""
    found = last_runs([row for row in rows if "us" in row and str(row["linear"]).startswith(PROLOGUE)], by=CASE)
    if not found:
        return ""
    columns = [
        Column("linear", left=True), Column("out x in"), Column("threads"), Column("transform and rounding, us"),
        Column("rounding alone, us"), Column("the same call twice, us"), Column("linear, us"), Column("share"),
        Column("quartiles"),
    ]  # fmt: skip
    cells: list[list[Cell]] = []
    for row in sorted(found, key=lambda row: row["threads"]):
        name, shape = row["linear"].removeprefix(f"{PROLOGUE} "), f"{row['out']} x {row['in']}"
        control = f"{row['control_us']:+.1f}" if "control_us" in row else "-"
        times = [f"{row['us']:.1f}", f"{row['rounding_us']:.1f}", control, f"{row['linear_us']:.0f}"]
        quartiles = f"{row['share_low']:.1%}-{row['share_high']:.1%}"
        cells.append([name, shape, str(row["threads"]), *times, f"{row['share']:.1%}", quartiles])
    said = "Medians over rounds; the share is of the linear without them, weights and factors cold, one token."
    return "\n\n".join([table(columns, cells), said, ending(found)])

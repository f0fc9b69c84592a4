"""`bench compare OLD NEW`: what became slower, larger or worse beyond the noise, row by row, on one device.

Speeds are first divided by how the peers of the same rounds moved between the two files (the median over the rows that
are not ours): a busy machine slows all of them, a slowed kernel of ours does not slow its peers.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.errors import ResultsError
from benchmarks.record import Row, device, devices, latest, one_device
from benchmarks.timing import quartiles

LEAST_CHANGE = 0.05
"""Smaller changes of a time are never flagged: an alignment, a cache's colour."""

IDENTITY = (
    "model", "linear", "out", "in", "tokens", "threads", "table", "recipe", "settings", "calibration", "seed", "files",
    "block", "prompt", "steps", "way",
)  # fmt: skip
"""Columns that say what was measured; those of them that a row lacks count as empty."""

WIDTHS = (16, 8, 6, 4)
"""Activation bits that columns are named for."""

LEAST_PEERS = 2
"""Fewer peers in one case say nothing of the machine."""


@dataclass(frozen=True)
class Metric:
    """A measured column, the columns of its quartiles (or of its relative spread), and which end is better.

    shared: whether all contenders of a case were measured in the same rounds. least: the smallest change that counts.
    """

    name: str
    low: str = ""
    high: str = ""
    spread: str = ""
    more_is_better: bool = False
    shared: bool = False
    least: float = LEAST_CHANGE


METRICS = (
    Metric("us", "us_low", "us_high", shared=True),
    Metric("decode_tokens_per_second", "decode_low", "decode_high", more_is_better=True, shared=True),
    Metric("prefill_tokens_per_second", spread="prefill_spread", more_is_better=True, shared=True),
    Metric("compile_cold_seconds", least=0.25),
    Metric("compile_warm_seconds", least=0.25),
    Metric("seconds", least=0.25),
    Metric("peak_mib", least=0.1),
    Metric("n_bytes", least=0.001),
    Metric("true_bits", least=0.001),
    *(Metric(f"a{bits}", least=0.01) for bits in WIDTHS),
    *(Metric(f"a{bits}_kl") for bits in WIDTHS),
    *(Metric(f"a{bits}_top1", more_is_better=True, least=0.01) for bits in WIDTHS),
    *(Metric(f"a{bits}_task", more_is_better=True) for bits in WIDTHS),
)
"""Seconds of single runs have no quartiles: only a quarter more counts. An accuracy's step is one question: only the
twentieth part of it counts."""


@dataclass(frozen=True)
class Change:
    """One metric of one row. change: new over old, less 1, the machine taken out. noise: what it may be."""

    what: str
    metric: str
    old: float
    new: float
    change: float
    noise: float
    worse: bool
    better: bool


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Return the changes of all rows that both have, those that are worse first.

    Of a file with rows of several devices those of the device measured last count, and of the other file that device's
    alone. Worse, or better: by more than both rows' quartile distances, the peers' own scatter and the metric's least
    change together. Raises ResultsError where the files have no device in common, or no row of it.
    """
    newer = next(iter(devices(new)), [])
    older = [row for row in old if newer and device(row) == device(newer[0])]
    one_device([*(older or old), *newer], what="compare")
    before, after = (_by_identity(rows) for rows in (older, newer))
    pairs = {key: (before[key], after[key]) for key in after if key in before}
    if not pairs:
        raise ResultsError("compare: no row is in both files")
    found = [change for metric in METRICS for change in _changes(metric, pairs)]
    return sorted(found, key=lambda change: (not change.worse, -abs(change.change)))


Key = tuple[str, ...]
Pairs = Mapping[Key, tuple[Row, Row]]


def _by_identity(rows: Sequence[Row]) -> dict[Key, Row]:
    return {tuple(str(row.get(name, "")) for name in IDENTITY): row for row in latest(rows, by=IDENTITY)}


def _changes(metric: Metric, pairs: Pairs) -> Iterator[Change]:
    for key, (old, new) in pairs.items():
        if not _comparable(metric, old, new):
            continue
        drift, scatter = _drift(metric, pairs, key) if metric.shared else (1.0, 0.0)
        before, after = float(old[metric.name]), float(new[metric.name])
        change = after / before / drift - 1
        noise = _noise(metric, old) + _noise(metric, new) + scatter
        worse = -change if metric.more_is_better else change
        beyond = max(noise, metric.least)
        what = ", ".join(part for part in key if part)
        yield Change(what, metric.name, before, after, change, noise, worse > beyond, worse < -beyond)


def _comparable(metric: Metric, old: Row, new: Row) -> bool:
    """Whether a metric's change has a meaning: nothing is relative to 0, but a share may have fallen to it."""
    before, after = old.get(metric.name), new.get(metric.name)
    return bool(before) and (bool(after) or (after is not None and metric.more_is_better))


def _drift(metric: Metric, pairs: Pairs, key: Key) -> tuple[float, float]:
    """Return (how the peers of a row's case moved, how far they differ in that); (1, 0) where there are too few."""
    ratios = [
        float(new[metric.name]) / float(old[metric.name])
        for other, (old, new) in pairs.items()
        if other[:-1] == key[:-1] and not other[-1].startswith("bwla") and old.get(metric.name) and new.get(metric.name)
    ]
    if len(ratios) < LEAST_PEERS:
        return 1.0, 0.0
    low, high = quartiles(ratios)
    middle = statistics.median(ratios)
    return middle, (high - low) / middle


def _noise(metric: Metric, row: Row) -> float:
    """Return the distance of a row's quartiles over its value; 0 where it has none, or is 0 itself."""
    if metric.low and metric.low in row and row[metric.name]:
        return abs(float(row[metric.high]) - float(row[metric.low])) / float(row[metric.name])
    return 2 * float(row[metric.spread]) if metric.spread in row else 0.0

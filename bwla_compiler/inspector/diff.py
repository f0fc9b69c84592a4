"""Two reports side by side: what differs between two recipes of one model, or between two models."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bwla_compiler.inspector.collapse import alike, mask, mask_name, span
from bwla_compiler.inspector.report import InspectorReport, LinearRow
from bwla_compiler.inspector.table import Cell, Table, number, row, size

SCHEMA = "bwla-inspector-diff/1"
"""Name and version of the JSON form."""


@dataclass(frozen=True)
class Change:
    """One thing that differs; "" or None stands for what one side does not have. lower_is_better: None where no side
    is better."""

    what: str
    a: str | float | None
    b: str | float | None
    lower_is_better: bool | None = None


@dataclass(frozen=True)
class LinearChange:
    """Linears (of all blocks together) that differ in the same way. names: all of them; label: one name for all."""

    label: str
    names: tuple[str, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Difference:
    """What differs between two reports. a, b: what they are called; settings: fields of the recipes."""

    a: str
    b: str
    totals: tuple[Change, ...]
    settings: tuple[Change, ...]
    linears: tuple[LinearChange, ...]
    equal_linears: int

    def to_json(self) -> str:
        """Return the difference as JSON, with its schema."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1)


FIELDS: tuple[tuple[str, Callable[[LinearRow], Any], bool | None], ...] = (
    ("decision", lambda x: x.decision, None),
    ("shape", lambda x: x.sizes, None),
    ("input", lambda x: x.input, None),
    ("reason", lambda x: x.reason, None),
    ("at run time", lambda x: x.format.transform or "-" if x.format else None, None),
    ("rank", lambda x: x.format.rank if x.format else None, None),
    ("planes", lambda x: x.format.planes if x.format else None, True),
    ("scales", lambda x: x.format.scales if x.format else None, None),
    ("activation bits", lambda x: x.format.activation_bits if x.format else None, None),
    ("bits", lambda x: x.bits, True),
    ("error", lambda x: x.error, True),
)
"""What is compared of a linear."""

MEASURED = frozenset(("bits", "error"))
"""Fields whose values differ from block to block: groups of linears show their means."""


def compare_reports(
    a: InspectorReport,
    b: InspectorReport,
    *,
    names: tuple[str, str],
    recipes: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
) -> Difference:
    """Return what differs. names: of the two sides; recipes: as tables, {} where there is none."""
    theirs = {x.name: x for x in b.linears}
    mine = {x.name: x for x in a.linears}
    changed = []
    for name in dict.fromkeys((*mine, *theirs)):
        changes = _linear_changes(mine.get(name), theirs.get(name))
        if changes:
            changed.append((name, changes))
    total = len(dict.fromkeys((*mine, *theirs)))
    return Difference(
        *names,
        totals=tuple(_totals(a, b)),
        settings=tuple(_settings(*recipes)),
        linears=tuple(_together(changed)),
        equal_linears=total - len(changed),
    )


def _linear_changes(a: LinearRow | None, b: LinearRow | None) -> tuple[Change, ...]:
    if a is None or b is None:
        return (Change("only in one", a.decision if a else "", b.decision if b else ""),)
    found = []
    for what, get, lower in FIELDS:
        x, y = get(a), get(b)
        same = mask(x) == mask(y) if what == "reason" else x == y
        if not same:
            found.append(Change(what, x, y, lower))
    return tuple(found)


def _together(changed: list[tuple[str, tuple[Change, ...]]]) -> list[LinearChange]:
    """Put linears that differ in the same way together; of measured fields, the means."""
    keyed = ((_key(name, changes), (name, changes)) for name, changes in changed)
    found = []
    for same in alike(keyed):
        names = tuple(name for name, _ in same)
        columns = zip(*(changes for _, changes in same), strict=True)
        found.append(LinearChange(span(names), names, tuple(map(_mean, columns))))
    return found


def _key(name: str, changes: tuple[Change, ...]) -> tuple[Any, ...]:
    masked = ((c.what, "", "") if c.what in MEASURED else (c.what, mask(str(c.a)), mask(str(c.b))) for c in changes)
    return (mask_name(name), *masked)


def _mean(same: tuple[Change, ...]) -> Change:
    first = same[0]
    if first.what not in MEASURED:
        return first
    a, b = (_average(c.a for c in same), _average(c.b for c in same))
    return Change(first.what, a, b, first.lower_is_better)


def _average(values: Iterable[str | float | None]) -> float | None:
    known = [value for value in values if isinstance(value, float)]
    return sum(known) / len(known) if known else None


def _totals(a: InspectorReport, b: InspectorReport) -> list[Change]:
    pairs: list[tuple[str, Any, Any, bool | None]] = [
        (f"linears {d}", n, b.counts[d], None) for d, n in a.counts.items()
    ]
    pairs.append(("free bases", _n_free(a), _n_free(b), None))
    pairs.append(("mean bits of linears", _mean_bits(a), _mean_bits(b), True))
    pairs.append(("mean error of linears", _mean_error(a), _mean_error(b), True))
    if a.bits and b.bits:
        pairs.append(("true bits, model", a.bits.model, b.bits.model, True))
    if a.cost and b.cost:
        pairs.append(("modelled bytes", a.cost.n_bytes, b.cost.n_bytes, True))
        for x, y in zip(a.cost.devices, b.cost.devices, strict=True):
            pairs.append((f"modelled ms a token, {x.device}", 1e3 * x.seconds, 1e3 * y.seconds, True))
    return [Change(what, x, y, lower) for what, x, y, lower in pairs if x is not None or y is not None]


def _n_free(report: InspectorReport) -> int:
    return sum(basis.freedom != "pinned" for basis in report.bases)


def _mean_bits(report: InspectorReport) -> float | None:
    """Return bits a weight over all linears whose bits are known, by their weights."""
    known = [(x.bits, max(1, x.experts) * x.in_features * x.out_features) for x in report.linears]
    counted = [(bits * n, n) for bits, n in known if bits is not None]
    return sum(b for b, _ in counted) / sum(n for _, n in counted) if counted else None


def _mean_error(report: InspectorReport) -> float | None:
    return _average(x.error for x in report.linears)


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    x, y = _flat(a), _flat(b)
    skipped = ("name", "source", "purpose")
    return [
        Change(key, x.get(key, ""), y.get(key, ""))
        for key in dict.fromkeys((*x, *y))
        if x.get(key) != y.get(key) and key not in skipped
    ]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


# ---------------------------------------------------------------- tables


def difference_tables(difference: Difference) -> list[Table]:
    """Return what differs as tables: the whole, the recipes' fields, the linears."""
    a, b = difference.a, difference.b
    totals = tuple(_row(c) for c in difference.totals if c.a != c.b)
    settings = tuple(_row(c)[:3] for c in difference.settings)
    linears = tuple(
        (Cell(x.label if i == 0 else ""), *_row(change))
        for x in difference.linears
        for i, change in enumerate(x.changes)
    )
    equal = f"equal linears: {difference.equal_linears}; bits and errors of several linears are means"
    return [
        Table("In all", ("what", f">{a}", f">{b}", ">b / a"), totals, "" if totals else "No difference."),
        Table("Recipes", ("field", a, b), settings),
        Table("Linears", ("linear", "what", a, b, ">b / a"), linears, equal),
    ]


def _row(change: Change) -> tuple[Cell, ...]:
    texts = [_text(change.what, value) for value in (change.a, change.b)]
    ratio, role = "", ""
    if isinstance(change.a, (int, float)) and isinstance(change.b, (int, float)) and change.a:
        ratio = f"{change.b / change.a:.2f}"
        better = change.lower_is_better is not None and change.b != change.a
        role = ("folded" if change.b < change.a else "partial") if better else ""
    return row(change.what, *texts, Cell(ratio, role))


def _text(what: str, value: str | float | None) -> str:
    if isinstance(value, (int, float)):
        return size(value) if "bytes" in what else number(value)
    return value or "-"

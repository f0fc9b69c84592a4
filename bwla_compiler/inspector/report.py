"""What is known of a model and its quantization, as plain data; the terminal and the page only draw it."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bwla_compiler.graph.plan import Basis, Linear, Norm, Plan
from bwla_compiler.inspector.cost import CostReport

SCHEMA = "bwla-inspector/1"
"""Name and version of the JSON form; the version rises when a field changes its meaning or goes."""

LETTERS = {"folded": "F", "partial": "P", "online": "O", "alone": "-"}
"""One letter for each decision about a linear's input."""

MEANINGS = {
    "folded": "its input's rotation is folded into the writers: nothing to do at run time",
    "partial": "one Kronecker factor is folded, the other is applied at run time",
    "online": "the whole transform is applied at run time",
    "alone": "left as it is",
}


class BitsLike(Protocol):
    """True bits as the api counts them: bits per weight of linears and model, bytes of the model."""

    @property
    def linears(self) -> float: ...
    @property
    def model(self) -> float: ...
    @property
    def n_bytes(self) -> int: ...


class LinearOutcome(Protocol):
    """What quantizing one linear gave. Errors are relative to the original's."""

    @property
    def name(self) -> str: ...
    @property
    def true_bits(self) -> float | None: ...
    @property
    def weight_error(self) -> float | None: ...
    @property
    def output_error(self) -> float | None: ...
    @property
    def seconds(self) -> float: ...
    @property
    def tokens(self) -> object | None: ...


class PassOutcome(Protocol):
    """What one pass changed and skipped: pairs of a name and a text."""

    @property
    def name(self) -> str: ...
    @property
    def changed(self) -> Sequence[tuple[str, str]]: ...
    @property
    def skipped(self) -> Sequence[tuple[str, str]]: ...
    @property
    def seconds(self) -> float: ...


class Outcome(Protocol):
    """The part of a quantization's report that the inspector shows."""

    @property
    def linears(self) -> Sequence[LinearOutcome]: ...
    @property
    def passes(self) -> Sequence[PassOutcome]: ...
    @property
    def bits(self) -> BitsLike: ...


@dataclass(frozen=True)
class LinearRow:
    """One linear: decision and reason, and, where it was quantized, what that cost (else None).

    short: the name within its block. input, output: text form of the bases.
    """

    name: str
    short: str
    block: str
    group: str
    in_features: int
    out_features: int
    decision: str
    reason: str
    input: str
    output: str
    writes_residual: bool
    true_bits: float | None = None
    weight_error: float | None = None
    output_error: float | None = None
    seconds: float | None = None
    experts: int = 0

    @property
    def sizes(self) -> str:
        """Channels read and written, after the number of experts where there are several matrices."""
        return f"{f'{self.experts} x ' if self.experts else ''}{self.in_features} → {self.out_features}"


@dataclass(frozen=True)
class BlockRow:
    """Blocks of one structure, drawn once. label: "layers.{0-35}"; names: the blocks; linears: of the first."""

    label: str
    names: tuple[str, ...]
    linears: tuple[LinearRow, ...]


@dataclass(frozen=True)
class PassRow:
    """One pass: how much it changed, and what it skipped with reasons."""

    name: str
    n_changed: int
    skipped: tuple[tuple[str, str], ...]
    seconds: float


@dataclass(frozen=True)
class BitsRow:
    """True bits per weight of the block linears and of the whole model, and the bytes of the model."""

    linears: float
    model: float
    n_bytes: int


@dataclass(frozen=True)
class InspectorReport:
    """All that terminal and page show. source: what was inspected; recipe: its name, "" where none was asked."""

    model: str
    source: str
    recipe: str
    linears: tuple[LinearRow, ...]
    blocks: tuple[BlockRow, ...]
    bases: tuple[Basis, ...]
    norms: tuple[Norm, ...]
    tied: tuple[tuple[str, str], ...] = ()
    unknown: dict[str, int] = field(default_factory=dict)
    passes: tuple[PassRow, ...] = ()
    bits: BitsRow | None = None
    cost: CostReport | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many linears each decision holds for, in the order F, P, O, -."""
        found = Counter(linear.decision for linear in self.linears)
        return {decision: found[decision] for decision in LETTERS}

    @property
    def prefix(self) -> str:
        """What all names of blocks open with and tables leave out: "model." of model.layers.0, else ""."""
        names = [block.names[0] for block in self.blocks if block.names[0]]
        return (
            names[0][: names[0].rfind(".", 0, names[0].rfind("."))] + "." if names and names[0].count(".") > 1 else ""
        )

    @property
    def measured(self) -> bool:
        """Whether errors of a quantization are known."""
        return any(x.output_error is not None or x.weight_error is not None for x in self.linears)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, with the schema's name first."""
        return {"schema": SCHEMA, "counts": self.counts, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict(), indent=1)


def build_report(
    plan: Plan,
    *,
    source: str = "",
    recipe: str = "",
    outcome: Outcome | None = None,
    bits: BitsLike | None = None,
    cost: CostReport | None = None,
) -> InspectorReport:
    """Return the report on a plan, on a quantization where its outcome is given, and with modelled costs if given."""
    measured = {x.name: x for x in outcome.linears} if outcome else {}
    rows = tuple(_linear_row(linear, measured.get(linear.name)) for linear in plan.linears)
    counted = bits or (outcome.bits if outcome else None)
    return InspectorReport(
        model=plan.model,
        source=source,
        recipe=recipe,
        linears=rows,
        blocks=collapse_blocks(rows),
        bases=plan.bases,
        norms=plan.norms,
        tied=plan.tied,
        unknown=dict(plan.unknown),
        passes=tuple(
            PassRow(p.name, len(p.changed), tuple((w, r) for w, r in p.skipped), p.seconds)
            for p in (outcome.passes if outcome else ())
        ),
        bits=BitsRow(counted.linears, counted.model, counted.n_bytes) if counted else None,
        cost=cost,
    )


def _linear_row(linear: Linear, outcome: LinearOutcome | None) -> LinearRow:
    row = LinearRow(
        name=linear.name,
        short=linear.name.removeprefix(linear.block + ".") if linear.block else linear.name,
        block=linear.block,
        group=linear.group,
        in_features=linear.in_features,
        out_features=linear.out_features,
        decision=linear.decision,
        reason=linear.reason,
        input=str(linear.input),
        output=str(linear.output),
        writes_residual=linear.writes_residual,
        experts=linear.experts,
    )
    if outcome is None:
        return row
    return dataclasses.replace(
        row,
        reason=f"{row.reason}; {outcome.tokens}" if outcome.tokens else row.reason,
        true_bits=outcome.true_bits,
        weight_error=outcome.weight_error,
        output_error=outcome.output_error,
        seconds=outcome.seconds,
    )


def mask(text: str) -> str:
    """Return a reason without the numbers in it, so that those of repeated blocks agree: silu_1 is as silu."""
    return re.sub(r"\d+", "#", re.sub(r"_\d+\b", "", text))


def mask_name(name: str) -> str:
    """Return a dotted name with the parts that are numbers hidden: layers.3.ln_1 -> layers.#.ln_1."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


def collapse_blocks(rows: Iterable[LinearRow]) -> tuple[BlockRow, ...]:
    """Return the blocks, those of equal structure together: same linears, shapes, decisions and reasons."""
    blocks: dict[str, list[LinearRow]] = {}
    for row in rows:
        blocks.setdefault(row.block, []).append(row)
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, members in blocks.items():
        structure = tuple(
            (
                x.short,
                x.experts,
                x.in_features,
                x.out_features,
                x.decision,
                mask(x.reason),
                mask_name(x.input),
                mask_name(x.output),
            )
            for x in members
        )
        alike.setdefault((bool(name), *structure), []).append(name)
    return tuple(BlockRow(span(names), tuple(names), tuple(blocks[names[0]])) for names in alike.values())


def span(names: Sequence[str]) -> str:
    """Return one name for many that differ in one number: layers.0.x, layers.1.x -> layers.{0-1}.x.

    Where they differ in more, the first and how many others.
    """
    if len(names) == 1:
        return names[0]
    parts = [re.split(r"(\d+)", name) for name in names]
    varying = [i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1]
    if len({len(p) for p in parts}) > 1 or len(varying) != 1 or not parts[0][varying[0]].isdigit():
        return f"{names[0]} and {len(names) - 1} more"
    (at,) = varying
    return "".join([*parts[0][:at], "{" + ranges([int(p[at]) for p in parts]) + "}", *parts[0][at + 1 :]])


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as ranges: 0, 1, 2, 5 -> "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def collapse_bases(bases: Iterable[Basis]) -> tuple[tuple[str, int, Basis], ...]:
    """Return (name for all, how many, the first) of bases that differ in the number of their block alone."""
    alike: dict[tuple[Any, ...], list[Basis]] = {}
    for basis in bases:
        key = (mask_name(basis.name), basis.size, basis.freedom, mask(basis.reason))
        alike.setdefault(key, []).append(basis)
    return tuple((span([b.name for b in found]), len(found), found[0]) for found in alike.values())


def collapse_norms(norms: Iterable[Norm]) -> tuple[tuple[str, int, Norm], ...]:
    """Return (name for all, how many, the first) of norms that differ in the number of their block alone."""
    alike: dict[tuple[str, int, str], list[Norm]] = {}
    for norm in norms:
        alike.setdefault((mask_name(norm_name(norm)), len(norm.absorbed_by), mask(norm.reason)), []).append(norm)
    return tuple((span([norm_name(n) for n in found]), len(found), found[0]) for found in alike.values())


def norm_name(norm: Norm) -> str:
    """Return the parameter that a norm is known by."""
    return norm.gain or norm.shift or "-"

"""What is known of a model and its quantization, as plain data; the terminal and the page only draw it."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any, Protocol

from bwla_compiler.errors import CheckpointError, PlanError
from bwla_compiler.graph.network import chains
from bwla_compiler.graph.plan import Basis, Expression, Linear, Norm, Plan
from bwla_compiler.graph.reading import read
from bwla_compiler.inspector.collapse import alike, mask, mask_name, span
from bwla_compiler.inspector.cost import CostReport
from bwla_compiler.inspector.formats import Format
from bwla_compiler.numerics.spread import Spread

SCHEMA = "bwla-inspector/3"
"""Name and version of the JSON form; the version rises when a field comes, goes or changes its meaning."""

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
    @property
    def spread(self) -> Spread | None: ...


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

    short: the name within its block. input, output: text form of the bases; input_bases, output_bases: the names in
    them, free bases and others. format: how it is stored and run, None where it is not packed. spread: how weight and
    input are spread, before and after. true_bits: stored, its transform counted.
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
    input_bases: tuple[str, ...]
    output_bases: tuple[str, ...]
    writes_residual: bool
    true_bits: float | None = None
    weight_error: float | None = None
    output_error: float | None = None
    seconds: float | None = None
    experts: int = 0
    format: Format | None = None
    spread: Spread | None = None

    @property
    def bits(self) -> float | None:
        """Bits a weight: those that are stored where they were counted, else those of the format."""
        return self.true_bits if self.true_bits is not None else self.format.bits if self.format else None

    @property
    def error(self) -> float | None:
        """The share of the output that is lost, of the weight where no input was seen; None where not measured."""
        return self.output_error if self.output_error is not None else self.weight_error

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
    """All that terminal and page show. source: what was inspected; recipe: its name, "" where none was asked.

    chains: names of free bases that some axis shares, together; each chain may be rotated by itself. repeated: which
    blocks were not looked at because others are alike, "" where all were.
    """

    model: str
    source: str
    recipe: str
    linears: tuple[LinearRow, ...]
    bases: tuple[Basis, ...]
    chains: tuple[tuple[str, ...], ...]
    norms: tuple[Norm, ...]
    tied: tuple[tuple[str, str], ...] = ()
    unknown: dict[str, int] = field(default_factory=dict)
    passes: tuple[PassRow, ...] = ()
    bits: BitsRow | None = None
    cost: CostReport | None = None
    repeated: str = ""

    @cached_property
    def blocks(self) -> tuple[BlockRow, ...]:
        """The blocks, those of one structure together; what is outside all blocks comes last."""
        return collapse_blocks(self.linears)

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
        return any(x.error is not None for x in self.linears)

    @property
    def spreads(self) -> bool:
        """Whether the spread of weights or inputs is known."""
        return any(x.spread is not None for x in self.linears)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, with the schema's name first; blocks as names of their linears."""
        blocks = [{"label": b.label, "names": b.names, "linears": [x.short for x in b.linears]} for b in self.blocks]
        return {"schema": SCHEMA, "counts": self.counts, "blocks": blocks, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    @staticmethod
    def from_json(text: str) -> "InspectorReport":
        """Return the report that `to_json` gave. Raises CheckpointError where it is damaged or of another version."""
        try:
            table = json.loads(text)
            found = table.get("schema") if isinstance(table, dict) else None
            if found != SCHEMA:
                raise CheckpointError(f"the report is of version {found!r}, this bwla-compiler reads {SCHEMA!r}")
            plain = {k: v for k, v in table.items() if k not in ("schema", "counts", "blocks")}
            return read(InspectorReport, plain, where="report")
        except (ValueError, PlanError) as error:
            raise CheckpointError(f"the report is damaged: {error}; inspect or quantize anew") from error

    def _repr_html_(self) -> str:
        """Return the page in a frame of its own, which is what a notebook shows."""
        from bwla_compiler.inspector.sections import report_page  # the page draws reports: it knows this module

        page = escape(report_page(self), quote=True)
        style = "width:100%;height:720px;border:0"
        return f'<iframe srcdoc="{page}" style="{style}" title="{escape(self.model)}"></iframe>'


def build_report(
    plan: Plan,
    *,
    source: str = "",
    recipe: str = "",
    outcome: Outcome | None = None,
    bits: BitsLike | None = None,
    cost: CostReport | None = None,
    formats: Mapping[str, Format] | None = None,
) -> InspectorReport:
    """Return the report on a plan, on a quantization where its outcome is given, and with modelled costs if given.

    formats: by name, of the linears that are packed.
    """
    measured, known = {x.name: x for x in outcome.linears} if outcome else {}, formats or {}
    rows = tuple(_linear_row(x, measured.get(x.name), known.get(x.name)) for x in plan.linears)
    counted = bits or (outcome.bits if outcome else None)
    return InspectorReport(
        model=plan.model,
        source=source,
        recipe=recipe,
        linears=rows,
        bases=plan.bases,
        chains=chains(plan),
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


def _linear_row(linear: Linear, outcome: LinearOutcome | None, stored: Format | None) -> LinearRow:
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
        input_bases=_bases(linear.input),
        output_bases=_bases(linear.output),
        writes_residual=linear.writes_residual,
        experts=linear.experts,
        format=stored,
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
        spread=outcome.spread,
    )


def _bases(axis: Expression) -> tuple[str, ...]:
    return tuple(dict.fromkeys(leaf.basis for leaf in axis.leaves() if leaf.basis))


def collapse_blocks(rows: Iterable[LinearRow]) -> tuple[BlockRow, ...]:
    """Return the blocks, those of equal structure together: same linears, shapes, decisions and reasons."""
    blocks = alike((row.block, row) for row in rows)
    found = alike(((bool(members[0].block), *map(_structure, members)), members) for members in blocks)
    return tuple(
        BlockRow(span([b[0].block for b in same]), tuple(b[0].block for b in same), tuple(same[0])) for same in found
    )


def _structure(x: LinearRow) -> tuple[Any, ...]:
    """Return what has to agree in blocks that are drawn once."""
    return (
        x.short,
        x.experts,
        x.in_features,
        x.out_features,
        x.decision,
        mask(x.reason),
        mask_name(x.input),
        mask_name(x.output),
    )

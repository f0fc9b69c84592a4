"""Roofline of a whole model: its groups of linears, embeddings and heads, what stays in floats, and attention.

Expressions of M tokens a step, a batch of B sequences and a context of C tokens each; modelled, never measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy as sp

from bwla_compiler.cost.devices import Device
from bwla_compiler.cost.roofline import (
    FLOAT_BYTES,
    PEAKS,
    SYMBOLS,
    M,
    Stage,
    compute_seconds,
    memory_seconds,
    peaks,
    sizes,
    symbolic_cost,
)
from bwla_compiler.spec import Coding, LinearSpec, TransformSpec

B, C = sp.symbols("B C", positive=True)
"""Sequences of a step, and tokens that each of them has once the step is done (of which M / B are new)."""

MODEL_FLOAT = 16
"""Bits of a weight that is not quantized, in a model as it is deployed."""

ATTENTION = "attention"
"""Name of the stages of attention."""

NOTHING = TransformSpec()
"""No change of basis."""


@dataclass(frozen=True)
class GroupShape:
    """A spec and how many groups of the model have it. name: of its linears, as "gate_proj, up_proj".

    experts, used: matrices of each member, and those that one token takes; spec is that of one.
    """

    name: str
    spec: LinearSpec
    count: int = 1
    experts: int = 1
    used: int = 1


@dataclass(frozen=True)
class TableShape:
    """An embedding or a head [rows, width]. coding: of its codes (scales are float16), None for floats.

    looked_up: one row a token is read, else all of them are multiplied. shared: the rows are stored elsewhere.
    """

    name: str
    rows: int
    width: int
    coding: Coding | None
    looked_up: bool
    shared: bool = False
    transform: TransformSpec = NOTHING
    column_scaled: bool = False
    bias: bool = False


@dataclass(frozen=True)
class KeptShape:
    """Weights that stay in floats. used: of `experts` equal parts, those that one token takes (1 of 1: all)."""

    name: str
    weights: int
    experts: int = 1
    used: int = 1


@dataclass(frozen=True)
class AttentionShape:
    """Layers of equal attention, with a 16-bit cache. window: tokens that a layer looks back at most, 0 for all."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0


@dataclass(frozen=True)
class ModelShape:
    """All that the cost model knows of a model. rest: other stored values (norms, positions). unknown: what is not
    modelled, in words, "" for nothing. float_bytes: of a float that is kept."""

    groups: tuple[GroupShape, ...]
    tables: tuple[TableShape, ...] = ()
    kept: tuple[KeptShape, ...] = ()
    attention: tuple[AttentionShape, ...] = ()
    rest: int = 0
    unknown: str = ""
    float_bytes: int = MODEL_FLOAT // 8

    @cached_property
    def stages(self) -> tuple[tuple[str, Stage, sp.Expr | None], ...]:
        """(name, stage, its rows where each runs on one unit) of all parts, expressions of M, B and C."""
        found: list[tuple[str, Stage, sp.Expr | None]] = []
        for group in self.groups:
            numbers = sizes(group.spec, bias_bytes=self.float_bytes, n_experts=group.experts, n_used=group.used)
            values = dict(zip(SYMBOLS, numbers, strict=True))
            cost = symbolic_cost()
            for stage, rows in ((cost.prologue, M * group.used), (cost.product, None)):
                found.append((group.name, _times(_substituted(stage, values), group.count), rows))
        found += [(table.name, table_stage(table, float_bytes=self.float_bytes), None) for table in self.tables]
        found += [(kept.name, kept_stage(kept, float_bytes=self.float_bytes), None) for kept in self.kept]
        found += [(ATTENTION, attention_stage(shape), None) for shape in self.attention]
        rest = sp.Integer(self.rest * self.float_bytes)
        found.append(("rest", Stage(rest, rest, sp.Integer(0), sp.Integer(0)), None))
        return tuple(found)

    @property
    def stored(self) -> int:
        """Bytes of the packed model."""
        return int(sum(stage.stored for _, stage, _ in self.stages))

    @cached_property
    def moved(self) -> sp.Expr:
        """Bytes that a step moves, an expression of M, B and C."""
        return sp.expand(sum(stage.moved for _, stage, _ in self.stages))

    @cached_property
    def ops(self) -> sp.Expr:
        """Operations of a step, an expression of M, B and C."""
        return sp.expand(sum(stage.int8_ops + stage.float_ops for _, stage, _ in self.stages))

    def seconds(self, device: Device, *, batch: int, context: int, tokens: int | None = None) -> float:
        """Return the modelled seconds of a step of `tokens` tokens (a decoding step, one a sequence, if None)."""
        values = {M: tokens or batch, B: batch, C: context, **dict(zip(PEAKS, peaks(device), strict=True))}
        total = 0.0
        for _, stage, rows in self.stages:
            memory, compute = memory_seconds(stage), compute_seconds(stage, rows=rows)
            total += max(float(memory.subs(values)), float(compute.subs(values)))
        return total

    def crossover(self, device: Device, *, context: int) -> float | None:
        """Return the batch from which a decoding step computes longer than it moves bytes, None where it never does.

        context: tokens of each sequence, 0 to leave attention out. Prologues are counted at the whole device's peak:
        at such batches they fill it.
        """
        at_peak = dict(zip(PEAKS, peaks(device), strict=True))
        stages = [stage for name, stage, _ in self.stages if context or name != ATTENTION]
        step = {B: M, C: context}
        memory = sum(memory_seconds(stage) for stage in stages).subs({**step, **at_peak})
        compute = sum(compute_seconds(stage) for stage in stages).subs({**step, **at_peak})
        return _crossing(sp.expand(memory - compute))


def _crossing(difference: sp.Expr) -> float | None:
    """Return the M > 0 at which a difference that starts above 0 gets to 0; experts make it linear only in pieces."""
    low, high = 1.0, 2.0**20
    at = sp.lambdify(M, difference, modules="math")
    if at(high) >= 0:
        return None
    while high / low > 1 + 1e-12:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if at(middle) >= 0 else (low, middle)
    return float(high)


def table_stage(table: TableShape, *, float_bytes: int) -> Stage:
    """Return the cost of an embedding or a head, an expression of M; a head's products run in floats."""
    row = table.width * float_bytes
    if table.coding is not None:
        row = table.coding.code_bytes(table.width) + 2 * table.coding.scales(table.width)
    whole = table.rows * row + (table.coding is not None)
    t = table.transform
    turned = 2 * t.numbers + int(t.left) + int(t.right)
    turned += (int(t.scaled) + int(table.column_scaled)) * (2 * table.width + 1)
    own = turned + float_bytes * table.rows * table.bias
    turning = M * table.width * (2 * t.n1 * t.left + 2 * t.n2 * t.right + int(t.scaled) + int(table.column_scaled))
    stored = sp.Integer(own + (0 if table.shared else whole))
    if table.looked_up:
        return Stage(stored, turned + M * (row + FLOAT_BYTES * table.width), sp.Integer(0), turning)
    moved = own + whole + M * FLOAT_BYTES * (table.width + table.rows)
    return Stage(stored, moved, sp.Integer(0), turning + 2 * M * table.width * table.rows)


def kept_stage(kept: KeptShape, *, float_bytes: int) -> Stage:
    """Return the cost of weights in floats, an expression of M: experts are read once where any token takes them.

    No more than M * used of them can be: the worst case, which holds for small M.
    """
    stored = sp.Integer(kept.weights * float_bytes)
    read = stored * sp.Min(1, M * sp.Rational(kept.used, kept.experts))
    return Stage(stored, read, sp.Integer(0), 2 * M * sp.Rational(kept.weights * kept.used, kept.experts))


def attention_stage(shape: AttentionShape) -> Stage:
    """Return the cost of attention over a 16-bit cache, an expression of M, B and C.

    Bytes: keys and values of the context read, the new ones written. Operations: q k^T and the product with v, for
    each new token over the tokens up to itself (of a sequence's M / B new ones, the mean one sees C - (M / B - 1) / 2).
    A window takes the place of longer contexts.
    """
    seen = sp.Min(C, shape.window) if shape.window else C
    mean = seen - (M / B - 1) / 2 if not shape.window else sp.Min(C - (M / B - 1) / 2, shape.window)
    per_token = 2 * FLOAT_BYTES * shape.kv_heads * shape.head_dim
    moved = shape.layers * per_token * (B * seen + M)
    ops = shape.layers * 4 * M * mean * shape.heads * shape.head_dim
    return Stage(sp.Integer(0), sp.expand(moved), sp.Integer(0), sp.expand(ops))


def float_shape(shape: ModelShape) -> ModelShape:
    """Return the same model with nothing quantized: what the modelled gain is over."""
    kept = tuple(
        KeptShape(g.name, g.count * g.experts * g.spec.in_features * sum(g.spec.out_features), g.experts, g.used)
        for g in shape.groups
    )
    tables: Sequence[TableShape] = [
        TableShape(t.name, t.rows, t.width, None, t.looked_up, t.shared, bias=t.bias) for t in shape.tables
    ]
    return ModelShape((), tuple(tables), kept + shape.kept, shape.attention, shape.rest, shape.unknown)


def _substituted(stage: Stage, values: dict[sp.Symbol, int]) -> Stage:
    return Stage(*(e.subs(values) for e in (stage.stored, stage.moved, stage.int8_ops, stage.float_ops)))


def _times(stage: Stage, count: int) -> Stage:
    return Stage(*(count * e for e in (stage.stored, stage.moved, stage.int8_ops, stage.float_ops)))

"""Where a step's time goes: bytes, operations and seconds by part of a model. Modelled, never measured."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import sympy as sp

from bwla_compiler.cost.devices import Device
from bwla_compiler.cost.model import (
    B,
    C,
    GroupShape,
    ModelShape,
    attention_stage,
    kept_stage,
    table_stage,
)
from bwla_compiler.cost.roofline import SYMBOLS, M, Stage, sizes, symbolic_cost

PartName = Literal["weights", "transforms", "low rank", "kept", "embedding", "head", "attention", "rest"]
PARTS: tuple[PartName, ...] = get_args(PartName)
"""In the order in which they are drawn; "kept": weights in floats; "attention": its products and the KV cache."""


@dataclass(frozen=True)
class PartCost:
    """One part of a step on one device: bytes moved, operations (two a multiply-add), seconds."""

    name: PartName
    n_bytes: float
    ops: float
    seconds: float


@dataclass(frozen=True)
class _Work:
    """What one stage does: rows is None where it spreads over the whole device."""

    name: PartName
    moved: float
    int8_ops: float
    float_ops: float
    rows: float | None = None

    def seconds(self, device: Device) -> float:
        """Return the roofline's seconds."""
        compute = self.int8_ops / device.int8_ops_per_second + self.float_ops / device.bf16_flops
        if self.rows is not None:
            compute *= device.units / min(self.rows, device.units)
        return max(self.moved / device.bytes_per_second, compute)


def step_parts(
    shape: ModelShape, devices: Iterable[Device], *, batch: int, context: int, tokens: int
) -> dict[str, tuple[PartCost, ...]]:
    """Return, by device, the parts of a step of `tokens` tokens in `batch` sequences of `context` tokens.

    Those that do something; their seconds add up to what `ModelShape.seconds` gives. The low-rank pair is what the
    product takes more with it.
    """
    works = tuple(_works(shape, {M: tokens, B: batch, C: context}))
    return {device.name: _parts(works, device) for device in devices}


def _parts(works: Iterable[tuple[_Work, int]], device: Device) -> tuple[PartCost, ...]:
    totals: dict[PartName, list[float]] = {name: [0.0, 0.0, 0.0] for name in PARTS}
    for work, sign in works:
        found = totals[work.name]
        found[0] += sign * work.moved
        found[1] += sign * (work.int8_ops + work.float_ops)
        found[2] += sign * work.seconds(device)
    return tuple(PartCost(name, *found) for name, found in totals.items() if any(found))


def _works(shape: ModelShape, step: dict[sp.Symbol, int]) -> Iterator[tuple[_Work, int]]:
    """Yield each piece of work and its sign: a pair is the product with it less the product without."""
    for group in shape.groups:
        yield from _group_works(group, shape, step)
    for table in shape.tables:
        name: PartName = "embedding" if table.looked_up else "head"
        yield _work(name, table_stage(table, float_bytes=shape.float_bytes), step), 1
    for kept in shape.kept:
        yield _work("kept", kept_stage(kept, float_bytes=shape.float_bytes), step), 1
    for attention in shape.attention:
        yield _work("attention", attention_stage(attention), step), 1
    yield _Work("rest", shape.rest * shape.float_bytes, 0.0, 0.0), 1


def _group_works(group: GroupShape, shape: ModelShape, step: dict[sp.Symbol, int]) -> Iterator[tuple[_Work, int]]:
    cost = symbolic_cost()
    values = _values(group, group.spec.rank, shape.float_bytes)
    rows = float(step[M] * group.used)
    yield _times(replace(_work("transforms", cost.prologue, step | values), rows=rows), group.count), 1
    product = _times(_work("weights", cost.product, step | values), group.count)
    if not group.spec.rank:
        yield product, 1
        return
    plain = _times(_work("weights", cost.product, step | _values(group, 0, shape.float_bytes)), group.count)
    yield plain, 1
    yield replace(product, name="low rank"), 1
    yield replace(plain, name="low rank"), -1


def _values(group: GroupShape, rank: int, float_bytes: int) -> dict[sp.Symbol, int]:
    spec = replace(group.spec, rank=rank)
    numbers = sizes(spec, bias_bytes=float_bytes, n_experts=group.experts, n_used=group.used)
    return dict(zip(SYMBOLS, numbers, strict=True))


def _work(name: PartName, stage: Stage, values: dict[sp.Symbol, int]) -> _Work:
    found = (float(sp.sympify(e).subs(values)) for e in (stage.moved, stage.int8_ops, stage.float_ops))
    return _Work(name, *found)


def _times(work: _Work, count: int) -> _Work:
    return replace(work, moved=count * work.moved, int8_ops=count * work.int8_ops, float_ops=count * work.float_ops)

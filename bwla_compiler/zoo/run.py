"""One architecture through capture, plan, folding, comparison, quantization, compilation: a row, whatever happens."""

import copy
import dataclasses
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from bwla_compiler.errors import BwlaError, CaptureError, ModelError
from bwla_compiler.evaluate.verification import Verification, verify_rotations
from bwla_compiler.graph.plan import Decision, Linear, Plan
from bwla_compiler.zoo.compiled import Compiled, Depth, Packed, compile_packed, compile_raw, pack, said
from bwla_compiler.zoo.ends import ends_error
from bwla_compiler.zoo.extent import Extent
from bwla_compiler.zoo.models import tiny_model

Status = Literal["exact", "wrong", "refused", "not built"]

SAMPLE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gpt2",
    "opt",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "falcon",
    "bloom",
    "olmo2",
    "cohere",
    "stablelm",
    "starcoder2",
    "granite",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "bert",
)
"""Families of many kinds, which go the whole way through Inductor where the extent is SAMPLE. None has a recurrence:
those are unrolled, and Inductor takes many minutes."""

UNFINISHED = "not done"

RAW = ("llama", "gpt2", "opt", "gemma2", "gpt_neox", "falcon", "bloom", "mixtral", "deepseek_v3", "mamba")
"""Families that are compiled as float models too, up to the door: past it their graphs are as those of packed ones."""


@dataclass(frozen=True)
class Kind:
    """Linears of one role that share a decision: name with N for the number of a layer, reason without numbers."""

    name: str
    decision: Decision
    reason: str
    count: int


@dataclass(frozen=True)
class ZooRow:
    """What became of one architecture.

    name: model_type. architecture: class. status: "exact" where rotations in every free space changed nothing and int8
    ends next to nothing, "wrong" where they did more, "refused" where it cannot be traced or planned, "not built" where
    no tiny model could be made. reason: why, naming the operation. n_free: spaces rotated. error: relative logit error
    in float64. kinds: its linears. share: of the weights that matrix products read, what is quantized, 0 to 1. unknown:
    operations without a rule. seconds: wall time. captured: whether a graph was had. packed: what quantizing gave.
    compiled, raw: what torch.compile made of the packed model, and of the float model; None where that was not tried.
    """

    name: str
    status: Status
    architecture: str = ""
    reason: str = ""
    n_free: int = 0
    error: float | None = None
    kinds: tuple[Kind, ...] = ()
    share: float = 0.0
    unknown: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    captured: bool = False
    packed: Packed | None = None
    compiled: Compiled | None = None
    raw: Compiled | None = None

    @property
    def decisions(self) -> dict[str, int]:
        """How many linears have each decision."""
        found: Counter[str] = Counter()
        for kind in self.kinds:
            found[kind.decision] += kind.count
        return dict(found)


def zoo_rows(name: str, seed: int = 0, *, extent: Extent = Extent.NONE) -> Iterator[ZooRow]:
    """Give the row of one architecture after each step that says more. What goes wrong is in the row.

    extent: how far what was captured is compiled.
    """
    start = time.perf_counter()
    for row in _steps(name, seed, extent):
        yield dataclasses.replace(row, seconds=time.perf_counter() - start)


def zoo_row(name: str, seed: int = 0, *, extent: Extent = Extent.NONE) -> ZooRow:
    """Return the row of one architecture after the last step, see `zoo_rows`."""
    return list(zoo_rows(name, seed, extent=extent))[-1]


def _steps(name: str, seed: int, extent: Extent) -> Iterator[ZooRow]:
    try:
        model = tiny_model(name, seed=seed)
    except Exception as error:  # configs and models of transformers raise whatever they like
        yield ZooRow(name, "not built", reason=said(error))
        return
    architecture = type(model).__name__
    try:
        found = verify_rotations(model, seed=seed)
    except Exception as error:
        status: Status = "refused" if isinstance(error, BwlaError) else "wrong"
        if isinstance(error, ModelError):
            status = "not built"
        captured = not isinstance(error, (CaptureError, ModelError))
        yield ZooRow(name, status, architecture, reason=said(error), captured=captured)
        return
    row = _judged(name, model, found, seed)
    yield row
    if extent != Extent.NONE:
        yield from _compiling(row, model, found.weights, depth=_depth(name, extent), seed=seed)


def _depth(name: str, extent: Extent) -> Depth:
    return "whole" if extent == Extent.WHOLE or (extent == Extent.SAMPLE and name in SAMPLE) else "door"


def _compiling(row: ZooRow, model: nn.Module, weights: tuple[str, ...], *, depth: Depth, seed: int) -> Iterator[ZooRow]:
    """Give a row with what quantizing and compiling the model makes of it, step by step."""
    raw = Compiled("refused", "door", UNFINISHED) if row.name in RAW else None
    row = dataclasses.replace(row, compiled=Compiled("refused", depth, UNFINISHED), raw=raw)
    yield row
    small = copy.deepcopy(model)
    try:
        row = dataclasses.replace(row, packed=pack(small, weights, seed=seed))
    except Exception as error:
        row = dataclasses.replace(row, compiled=Compiled("refused", depth, f"quantizing: {said(error)}"))
    else:
        yield row
        row = dataclasses.replace(row, compiled=compile_packed(small, depth=depth, seed=seed))
    yield row
    if raw is not None:
        yield dataclasses.replace(row, raw=compile_raw(model, depth=raw.depth, seed=seed))


def interrupted(row: ZooRow | None, name: str, reason: str, *, seconds: float) -> ZooRow:
    """Return the row of an architecture whose steps ended with `row`, None before the first, for some reason."""
    if row is None:
        return ZooRow(name, "refused", reason=reason, seconds=seconds)
    rest = {
        field: dataclasses.replace(found, reason=reason)
        for field, found in (("compiled", row.compiled), ("raw", row.raw))
        if found is not None and found.reason == UNFINISHED
    }
    return dataclasses.replace(row, seconds=seconds, **rest)  # type: ignore[arg-type]


def _judged(name: str, model: nn.Module, found: Verification, seed: int) -> ZooRow:
    plan, reason = found.plan, ends_error(model, found.plan, seed=seed)
    if not found.error <= found.tolerance:  # NaN is not
        reason = f"relative logit error {found.error:.1e} after rotating {found.n_free} spaces"
    return ZooRow(
        name=name,
        status="wrong" if reason else "exact",
        architecture=type(model).__name__,
        reason=reason,
        n_free=found.n_free,
        error=found.error,
        kinds=kinds(plan),
        share=quantized_share(model, plan, found.weights),
        unknown=plan.unknown,
        captured=True,
    )


def quantized_share(model: nn.Module, plan: Plan, weights: tuple[str, ...]) -> float:
    """Return the share of the weights in matrix products that belongs to linears which are not left alone.

    weights: as of `graph.weights.product_weights`. 0 where there are none.
    """
    sizes = {id(p): p.numel() for p in map(model.get_parameter, weights)}
    quantized = {id(model.get_parameter(x.parameter)) for x in plan.linears if x.decision != "alone"}
    return sum(n for key, n in sizes.items() if key in quantized) / max(1, sum(sizes.values()))


def kinds(plan: Plan) -> tuple[Kind, ...]:
    """Return a plan's linears by role, decision and reason, in the order of the model."""
    found = Counter((re.sub(r"\.\d+(?=\.|$)", ".N", x.name), x.decision, plain_reason(x)) for x in plan.linears)
    return tuple(Kind(*key, count) for key, count in found.items())


def plain_reason(linear: Linear) -> str:
    """Return a linear's reason without the numbers that distinguish one node of an operation from the next."""
    text = re.sub(r"\b([a-z][a-z_]*?)(_\d+)+\b", r"\1", linear.reason)
    return text.replace("every writer of its input can take the rotation", "writers take the rotation")

"""One architecture through capture, plan, folding and comparison: a row, whatever happens."""

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from bwla_compiler.errors import BwlaError, CaptureError, ModelError
from bwla_compiler.evaluate.verification import Verification, verify_rotations
from bwla_compiler.graph.plan import Decision, Linear, Plan
from bwla_compiler.zoo.models import tiny_model

Status = Literal["exact", "wrong", "refused", "not built"]


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

    name: model_type. architecture: class. status: "exact" where rotations in every free space changed nothing,
    "wrong" where they did, "refused" where it cannot be traced or planned, "not built" where no tiny model could be
    made. reason: why, naming the operation. n_free: spaces rotated. error: relative logit error in float64.
    kinds: its linears. share: of the weights that matrix products read, what is quantized, 0 to 1. unknown:
    operations without a rule. seconds: wall time. captured: whether a graph was had.
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

    @property
    def decisions(self) -> dict[str, int]:
        """How many linears have each decision."""
        found: Counter[str] = Counter()
        for kind in self.kinds:
            found[kind.decision] += kind.count
        return dict(found)


def zoo_row(name: str, *, seed: int = 0) -> ZooRow:
    """Return the row of one architecture. Raises nothing: what goes wrong is in the row."""
    start = time.perf_counter()
    try:
        model = tiny_model(name, seed=seed)
    except Exception as error:  # configs and models of transformers raise whatever they like
        return ZooRow(name, "not built", reason=_said(error), seconds=time.perf_counter() - start)
    architecture = type(model).__name__
    try:
        found = verify_rotations(model, seed=seed)
    except Exception as error:
        status: Status = "refused" if isinstance(error, BwlaError) else "wrong"
        if isinstance(error, ModelError):
            status = "not built"
        captured = not isinstance(error, (CaptureError, ModelError))
        reason, seconds = _said(error), time.perf_counter() - start
        return ZooRow(name, status, architecture, reason, captured=captured, seconds=seconds)
    return _judged(name, model, found, seconds=time.perf_counter() - start)


def _judged(name: str, model: nn.Module, found: Verification, *, seconds: float) -> ZooRow:
    exact = found.error <= found.tolerance  # NaN is not
    plan = found.plan
    return ZooRow(
        name=name,
        status="exact" if exact else "wrong",
        architecture=type(model).__name__,
        reason="" if exact else f"relative logit error {found.error:.1e} after rotating {found.n_free} spaces",
        n_free=found.n_free,
        error=found.error,
        kinds=kinds(plan),
        share=quantized_share(model, plan, found.weights),
        unknown=plan.unknown,
        seconds=seconds,
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


def _said(error: Exception) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, BwlaError) else f"{type(error).__name__}: "
    return (kind + text)[:400]

"""The function after every pass: float64 logits against those of the model as it came; the first that differs is named.

Passes that quantize change the function on purpose. What is checked is all that comes before them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bwla_compiler.errors import PlanError
from bwla_compiler.evaluate.verification import IDS_SHAPE, TOLERANCE, Progress, captured_in_doubles, graph_logits
from bwla_compiler.graph.capture import rebind
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.numerics.kronecker import apply_kronecker
from bwla_compiler.passes.apply import check_weights
from bwla_compiler.passes.base import InsertTransform, Pass, PassContext, ReplaceModule, Untie
from bwla_compiler.passes.pipeline import run_pass
from bwla_compiler.passes.trial import exact_passes
from bwla_compiler.recipe import Recipe
from bwla_compiler.runtime.online import OnlineTransform
from bwla_compiler.tokens import device_of, vocabulary


@dataclass(frozen=True)
class Stage:
    """One pass: how much it changed and left alone; error: max |logits - reference| / max |reference| after it."""

    name: str
    n_changed: int
    n_skipped: int
    error: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether the model still computes what it did (NaN is a failure)."""
        return self.error <= self.tolerance


def check_passes(
    model: nn.Module,
    recipe: Recipe,
    *,
    passes: Sequence[Pass] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Stage, ...]:
    """Return a stage for each pass, run one after the other on a float64 copy, up to the first that breaks something.

    passes: those of the recipe that are exact, if none are given. Raises what `verify_rotations` raises.
    """
    tell = progress or (lambda label, done, total: None)
    check_weights(model)
    double = copy.deepcopy(model).to(torch.float64).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary(model), IDS_SHAPE, generator=generator).to(device_of(model))
    graph = captured_in_doubles(double)
    reference = graph_logits(graph, ids)
    plan = make_plan(double, graph=graph)
    steps = exact_passes(double, plan, recipe) if passes is None else passes
    stages: list[Stage] = []
    for step in steps:
        tell("checking passes", len(stages), len(steps))
        report = run_pass(double, step, PassContext(double, plan, recipe, seed))
        _run_in_doubles(double)
        replaced = any(isinstance(edit, (InsertTransform, ReplaceModule, Untie)) for edit in report.edits)
        if replaced or not rebind(graph, double):
            graph = captured_in_doubles(double)
        error = (graph_logits(graph, ids) - reference).abs().max() / reference.abs().max()
        stages.append(Stage(step.name, len(report.changed), len(report.skipped), float(error)))
        if not stages[-1].passed:
            break
    tell("checking passes", len(steps), len(steps))
    return tuple(stages)


def first_broken(stages: Sequence[Stage]) -> str:
    """Return a sentence that names the first pass that changed the function; "" where none did."""
    for before, stage in zip((None, *stages), stages, strict=False):
        if not stage.passed:
            fine = f"after {before.name} it was {before.error:.1e}" if before else "before it nothing had been done"
            return f"{stage.name} changes what the model computes: relative logit error {stage.error:.1e}, {fine}"
    return ""


def require_passed(stages: Sequence[Stage]) -> None:
    """Raise PlanError, naming the pass, where one changed what the model computes."""
    if broken := first_broken(stages):
        raise PlanError(f"{broken}; please report this with the model's name")


class _InDoubles(nn.Module):
    """A transform with the factors that an OnlineTransform stores, computed in float64 and not by its kernels."""

    scale: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def __init__(self, stored: OnlineTransform) -> None:
        super().__init__()
        self.spec = stored.spec
        for name, factor in zip(("scale", "left", "right"), stored.factors(), strict=True):
            self.register_buffer(name, None if factor is None else factor.to(torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] float64 -> [..., n]."""
        scaled = x if self.scale is None else x * self.scale
        return apply_kronecker(scaled, self.left, self.right)


def _run_in_doubles(model: nn.Module) -> None:
    """Put transforms that compute in float64 where those that run in float32 are."""
    for module in list(model.modules()):
        transform = getattr(module, "transform", None)
        if isinstance(transform, OnlineTransform):
            module.transform = _InDoubles(transform)

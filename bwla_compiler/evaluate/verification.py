"""Verification: rotations and folds must change nothing. Random rotations in every free basis, in float64."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bwla_compiler.errors import ModelError
from bwla_compiler.graph.capture import capture, lift_casts, rebind
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.graph.weights import product_weights
from bwla_compiler.passes.apply import check_weights
from bwla_compiler.passes.base import PassContext
from bwla_compiler.passes.fold_norms import FoldNorms
from bwla_compiler.passes.fold_rotations import FoldRotations
from bwla_compiler.passes.pipeline import run_pass
from bwla_compiler.passes.untie import Untie
from bwla_compiler.recipe import load_recipe
from bwla_compiler.tokens import device_of, vocabulary

TOLERANCE = 1e-10
"""Relative logit error; float64 leaves about 1e-15 per layer, a wrong fold 1e-2 or more."""

IDS_SHAPE = (3, 11)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Verification:
    """n_free: bases that were rotated. error: max |logits - reference| / max |reference|, in float64.

    weights: names of the weights that matrix products read, quantizable or not.
    """

    n_free: int
    error: float
    plan: Plan
    tolerance: float = TOLERANCE
    weights: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether something was free to rotate, and rotating it changed nothing (NaN is a failure)."""
        return self.n_free > 0 and self.error <= self.tolerance


def verify_rotations(model: nn.Module, *, seed: int = 0, progress: Progress | None = None) -> Verification:
    """Rotate every free basis of a copy of the model by a Haar matrix and compare the logits on random tokens.

    The model itself is not changed; the copy is float64. Raises WeightError, CaptureError, PlanError, and
    ModelError where the model's own logits are not finite.
    """
    report = progress or (lambda label, done, total: None)
    check_weights(model)
    report("copying to float64", 0, 4)
    double = copy.deepcopy(model).to(torch.float64).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary(model), IDS_SHAPE, generator=generator).to(device_of(model))
    report("reference logits", 1, 4)
    graph = captured_in_doubles(double)
    reference = graph_logits(graph, ids)
    if not bool(torch.isfinite(reference).all()):
        raise ModelError(f"{type(model).__name__}: its logits on random tokens are not finite before any rotation")
    report("planning and rotating", 2, 4)
    plan, weights = make_plan(double, graph=graph), product_weights(graph)
    context = PassContext(double, plan, load_recipe("bwla-w1a16"), seed)
    for step in (Untie(), FoldNorms(), FoldRotations(kind="haar", every=True)):
        run_pass(double, step, context)
    report("rotated logits", 3, 4)
    # the graph reads the very tensors that were edited; an added bias or an untied head takes a new capture
    if plan.tied or not rebind(graph, double):
        graph = captured_in_doubles(double)
    error = (graph_logits(graph, ids) - reference).abs().max() / reference.abs().max()
    report("verified", 4, 4)
    return Verification(len(plan.free), float(error), plan, weights=weights)


def captured_in_doubles(model: nn.Module) -> GraphModule:
    """Return a float64 model's graph for ids of IDS_SHAPE; float32 casts, which norms hard-code, are lifted."""
    batch, length = IDS_SHAPE
    graph = capture(model, batch=batch, length=length)
    lift_casts(graph)
    return graph


def graph_logits(graph: GraphModule, ids: Tensor) -> Tensor:
    """Return the logits of a captured graph for ids of the shape that it was captured for."""
    with torch.no_grad():
        logits = graph(input_ids=ids)
    assert isinstance(logits, Tensor)
    return logits

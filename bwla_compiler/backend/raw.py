"""Raw models: planned, quantized and lowered while torch.compile compiles them.

The steps: plan the model once, check that what the plan folds is legal in the graph at hand, quantize a copy (or read
it from the disk), put the copy's modules into the graph, hand the rest to Inductor, and watch the weights.
"""

import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from bwla_compiler.backend import disk
from bwla_compiler.backend.compiled import CompiledGraph
from bwla_compiler.backend.disk import Verdict, calibration_key
from bwla_compiler.backend.graph_key import graph_key
from bwla_compiler.backend.lower import HandOver
from bwla_compiler.backend.options import Options
from bwla_compiler.backend.owner import Owner
from bwla_compiler.backend.substitute import bound_to, substitute
from bwla_compiler.backend.twin import twin
from bwla_compiler.backend.variant import Variant, is_causal_lm, make_variant
from bwla_compiler.errors import CaptureError, PlanError
from bwla_compiler.graph.agreement import disagreement, without_folds
from bwla_compiler.graph.capture import capture, capture_graph
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import is_linear, make_plan
from bwla_compiler.passes.fold_rotations import FoldRotations
from bwla_compiler.recipe import Recipe

log = logging.getLogger(__name__)

Structure = tuple[tuple[object, ...], ...]

_VARIANTS: "weakref.WeakKeyDictionary[nn.Module, dict[str, Variant]]" = weakref.WeakKeyDictionary()
_PLANS: "weakref.WeakKeyDictionary[nn.Module, Plan]" = weakref.WeakKeyDictionary()
_STRUCTURES: "weakref.WeakKeyDictionary[nn.Module, Structure]" = weakref.WeakKeyDictionary()
_GRAPHS: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[CompiledGraph]]" = weakref.WeakKeyDictionary()


def variants_of(model: nn.Module) -> tuple[Variant, ...]:
    """Return the quantized copies that were made of a model, most often one."""
    return tuple(_VARIANTS.get(model, {}).values())


class RawGraph:
    """One graph of a raw model, and the steps that compile it."""

    def __init__(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        owner: Owner,
        options: Options,
        progress: Any,
        hand_over: HandOver,
    ) -> None:
        self.gm, self.inputs, self.owner, self.options, self.progress = gm, inputs, owner, options, progress
        self.hand_over = hand_over

    def compiled(self) -> Callable[..., Any]:
        """Return the callable that computes the graph with packed weights; see the module for the steps."""
        _forget_other_structure(self.owner.module)
        try:
            verdict = self._verdict()
        except PlanError as error:
            return self._in_floats(error)
        plan, reason = verdict.plan, verdict.reason
        if not reason:
            variant = self._variant(plan, self.options.recipe)
            graph = substitute(self.owner, self.gm, variant.quantized)
            if isinstance(graph, GraphModule):
                return self._lowered(graph, variant)
            reason = graph
        log.info("nothing is folded in this graph: %s", reason)
        return self._local(plan, reason)

    def _verdict(self) -> Verdict:
        """Return the model's plan and what this graph says of it, from the disk where this very graph was met before.

        Raises PlanError where the graph cannot be planned.
        """
        model, recipe = self.owner.module, self.options.recipe
        key = graph_key(self.gm, self.inputs, self.owner, recipe) if self.options.cache else ""
        known = disk.load_verdict(key) if self.options.cache else None
        if known and _PLANS.setdefault(model, known.plan) == known.plan:  # else planned in another order of graphs
            return known
        own = make_plan(model, graph=capture_graph(*self._bound()))
        plan = self._model_plan(own)
        reason = "the recipe does not rotate"
        if recipe.transform.kind != "none":
            reason = disagreement(plan, own, bases=_rotated(plan), present=self.owner.present())
        verdict = Verdict(plan, reason)
        if self.options.cache:
            disk.save_verdict(key, verdict)
        return verdict

    def _in_floats(self, error: PlanError) -> Callable[..., Any]:
        """Leave the graph to Inductor; aloud where that leaves linears as they were."""
        present = self.owner.present()
        linears = (name for name, module in self.owner.module.named_modules() if is_linear(module))
        level = logging.WARNING if any(f"{name}.weight" in present for name in linears) else logging.INFO
        log.log(level, "a graph of %s stays in floats: %s", type(self.owner.module).__name__, error)
        return self.hand_over(self.gm, self.inputs, mode=self.options.mode)

    def _bound(self) -> tuple[GraphModule, nn.Module, list[Any]]:
        bound, left = bound_to(self.owner, self.gm, self.inputs)
        return bound, self.owner.module, left

    def _model_plan(self, own: Plan) -> Plan:
        """Return the model's plan: of a causal LM with its cache among the outputs; of others, of their first graph."""
        model = self.owner.module
        if model not in _PLANS:
            _PLANS[model] = own
            if is_causal_lm(model):
                try:
                    # torch.export puts copies in place of a module's lists, whose identity Dynamo may guard on
                    _PLANS[model] = make_plan(model, graph=capture(twin(model), cache=True))
                except (CaptureError, PlanError) as error:
                    log.info("planned from the graph at hand: %s", error)
        return _PLANS[model]

    def _local(self, plan: Plan, reason: str) -> Callable[..., Any]:
        """Compile with transforms that stand right before their linears, which no graph can forbid."""
        recipe = dataclasses.replace(self.options.recipe, residual="none")
        variant = self._variant(without_folds(plan, reason="the graph at hand forbids the fold"), recipe)
        graph = substitute(self.owner, self.gm, variant.quantized)
        if isinstance(graph, str):
            raise PlanError(f"{reason}; and without folds, {graph}")
        return self._lowered(graph, variant)

    def _variant(self, plan: Plan, recipe: Recipe) -> Variant:
        """Return the quantized copy under a plan, up to date with the model's weights."""
        model = self.owner.module
        key = repr((plan.to_json(), recipe, calibration_key(self.options.calibration), self.options.seed))
        known = _VARIANTS.setdefault(model, {})
        if key not in known:
            known[key] = make_variant(model, plan, recipe, self.options, progress=self.progress)
        elif not all(known[key].seen[n].holds(p) for n, p in model.named_parameters(remove_duplicate=False)):
            known[key].refresh(model, progress=self.progress)
        return known[key]

    def _lowered(self, graph: GraphModule, variant: Variant) -> CompiledGraph:
        run = self.hand_over(graph, self.inputs, mode=self.options.mode)
        placeholders = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        parameters = [
            (i, self.owner.names[node][0])
            for i, (node, value) in enumerate(zip(placeholders, self.inputs, strict=True))
            if node in self.owner.names and isinstance(value, nn.Parameter)
        ]
        eager = graph.forward if self.options.verify else None
        compiled = CompiledGraph(run, variant, self.owner.module, parameters, eager=eager)
        if self.options.free_weights:
            compiled.release(self.inputs)
        self._count(compiled)
        return compiled

    def _count(self, compiled: CompiledGraph) -> None:
        """Warn where the next graph would be one too many for Dynamo, which then runs the float model."""
        graphs = _GRAPHS.setdefault(self.owner.module, weakref.WeakSet())
        graphs.add(compiled)  # weakly: those that Dynamo dropped do not count
        if len(graphs) >= torch._dynamo.config.recompile_limit:
            log.warning(
                "%s was compiled for %d ways of calling it, as many as torch._dynamo.config.recompile_limit allows: "
                "another one would run the float weights, uncompiled. Raise that limit, or pass fullgraph=True to "
                "have an error instead",
                type(self.owner.module).__name__,
                len(graphs),
            )


def _forget_other_structure(model: nn.Module) -> None:
    """Drop what was made of a model that had other modules, or parameters of other shapes, dtypes or ties."""
    structure = _structure(model)
    if _STRUCTURES.get(model, structure) != structure:
        log.info("the structure of %s changed: planned anew", type(model).__name__)
        _PLANS.pop(model, None)
        _VARIANTS.pop(model, None)
    _STRUCTURES[model] = structure


def _structure(model: nn.Module) -> Structure:
    first: dict[int, str] = {}
    modules = ((name, type(module)) for name, module in model.named_modules())
    parameters = (
        (name, p.shape, p.dtype, p.device, first.setdefault(id(p), name))
        for name, p in model.named_parameters(remove_duplicate=False)
    )
    return (*modules, *parameters)


def _rotated(plan: Plan) -> set[str]:
    """Return the bases that folding rotates."""
    return {basis.name for basis in plan.bases if FoldRotations().refusal(basis) == ""}

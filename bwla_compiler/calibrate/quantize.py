"""Quantize a model in place: plan, fold, then group by group along the data flow: gather, rotate, fit, replace."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bwla_compiler.calibrate.blocks import Blocks
from bwla_compiler.calibrate.experts import ExpertsFit, fit_experts
from bwla_compiler.calibrate.fit import LinearFit, fit_group, rank_of
from bwla_compiler.calibrate.hooks import Hooks
from bwla_compiler.calibrate.observe import Observer
from bwla_compiler.calibrate.overrides import check_overrides
from bwla_compiler.calibrate.report import BlockReport, LinearReport, QuantizeReport
from bwla_compiler.calibrate.residency import InMemory, Residency
from bwla_compiler.calibrate.routing import keep_routing, routed_rows
from bwla_compiler.calibrate.stream import Call, Progress, TwinStream, residual_operand
from bwla_compiler.calibrate.tune import tune
from bwla_compiler.errors import CalibrationError, RecipeError
from bwla_compiler.graph.basis import analyse
from bwla_compiler.graph.capture import capture, input_shape, rebind
from bwla_compiler.graph.plan import Group, Linear, Plan
from bwla_compiler.graph.planner import make_plan, site_modules
from bwla_compiler.numerics.activations import fake_quantize
from bwla_compiler.numerics.stats import LinearStats
from bwla_compiler.passes.base import Pass, PassContext, PassReport
from bwla_compiler.passes.insert_online import InsertOnline, skip_reason
from bwla_compiler.passes.pipeline import folding_passes, run_pass
from bwla_compiler.passes.quantize_ends import QuantizeEnds, head_names
from bwla_compiler.passes.quantize_linears import QuantizeLinears, module_or_none
from bwla_compiler.recipe import Recipe
from bwla_compiler.runtime.bits import measure_bits
from bwla_compiler.runtime.modules import PackedExperts, PackedLinear, SimulatedLinear
from bwla_compiler.runtime.transformed import TransformedLinear
from bwla_compiler.tokens import evaluating

log = logging.getLogger(__name__)

BATCH = 8
"""Calibration sequences that run through the graph at a time."""


def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    tokens: Tensor | None,
    *,
    plan: Plan | None = None,
    graph: GraphModule | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    weights: Residency | None = None,
    keep: Callable[[Any], Any] | None = None,
    on_block: Callable[[BlockReport], None] | None = None,
) -> QuantizeReport:
    """Quantize a causal LM in place and return the report.

    tokens [sequences, length] int64: calibration; None fits to the weights alone. plan: as `make_plan` gave it for
    this model, None to make it here. graph: as `capture` gave it for this architecture, which spares a capture where
    it was made for batches [BATCH, length] and the folds add no parameter. weights: who holds them, by default the
    model. Where memory is too short for the recipe's tuning, less is tuned, which is logged and stands in the report's
    recipe. keep: puts the streams' results where they are kept, by default nowhere else. on_block: told of each block
    that is done. Deterministic given the seed.
    Raises WeightError, CaptureError, PlanError, RecipeError or CalibrationError before anything is changed.
    """
    with evaluating(model):
        weights = weights or InMemory(model)
        weights.check()
        plan = plan or make_plan(model)
        _check_experts(plan, recipe)
        check_overrides(plan, recipe)
        return _Quantizer(model, recipe, tokens, plan, graph, seed, progress, weights, keep, on_block).run()


def _check_experts(plan: Plan, recipe: Recipe) -> None:
    """Raise RecipeError where experts would have to be packed in a form that they do not take."""
    experts = next((x.name for x in plan.linears if x.experts), "")
    if experts and (recipe.simulated or recipe.signs.method == "paper" or recipe.weights.scales != "row"):
        raise RecipeError(
            f"recipe {recipe.name}: experts ({experts}) take binary planes with one scale a row and no column scales; "
            "give another recipe"
        )


class _Quantizer:
    """The state of one run: reports gathered so far, and the streams where there is calibration."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        tokens: Tensor | None,
        plan: Plan,
        graph: GraphModule | None,
        seed: int,
        progress: Progress | None,
        weights: Residency,
        keep: Callable[[Any], Any] | None,
        on_block: Callable[[BlockReport], None] | None,
    ) -> None:
        self.weights, self.keep, self.on_block = weights, keep, on_block
        self.model, self.recipe, self.plan, self.graph, self.seed = model, recipe, plan, graph, seed
        self.tokens = tokens if recipe.needs_calibration else None
        self.progress = progress or (lambda label, done, total: None)
        self.passes: list[PassReport] = []
        self.linears: list[LinearReport] = []
        self.seconds: dict[str, float] = {}

    def run(self) -> QuantizeReport:
        start = time.perf_counter()
        hooks = Hooks(self.model)
        self._afford()
        self.context = PassContext(self.model, self.plan, self.recipe, self.seed)
        self.weights.prepare(self.plan)
        self.observer = self._observer()
        for step in folding_passes(self.recipe):
            self._note(self.weights.fold(step, self.context))
        self.stream = self._open_stream()
        ends = QuantizeEnds(rotated=self.recipe.transform.kind != "none" and self.recipe.residual == "folded")
        self._groups()
        self.weights.fetch_rest()
        teacher = self._teacher()
        self._pass(ends)
        hooks.put_back(self.model)
        if teacher is not None:
            self._tune(teacher)
        self.seconds["total"] = time.perf_counter() - start
        bits = measure_bits(self.model)
        return QuantizeReport(self.recipe, self.plan, _merged(self.passes), tuple(self.linears), bits, self.seconds)

    def _afford(self) -> None:
        """Tune as much as there is memory for."""
        tuning, change = (
            self.weights.afford(self.recipe.tuning) if self.tokens is not None else (self.recipe.tuning, "")
        )
        self.recipe = dataclasses.replace(self.recipe, tuning=tuning)
        if change:
            self.passes.append(PassReport("tune", skipped=[("all", change)]))
            log.warning("%s", change)

    def _observer(self) -> Observer:
        """Return who looks at weights and inputs, those of the float model among them where that is in memory."""
        observer = Observer(self.plan, bits=self.recipe.activations.bits)
        self.weights.watch(observer.see_original)
        if self.tokens is not None and isinstance(self.weights, InMemory):
            observer.see_inputs(self.model, self.tokens)
        return observer

    def _pass(self, step: Pass) -> None:
        self._note(run_pass(self.model, step, self.context))

    def _note(self, report: PassReport) -> None:
        self.passes.append(report)
        self.seconds[report.name] = self.seconds.get(report.name, 0.0) + report.seconds

    def _open_stream(self) -> TwinStream | None:
        if self.tokens is None:
            return None
        batch = min(BATCH, self.tokens.shape[0])
        usable = self.tokens[: self.tokens.shape[0] // batch * batch]
        graph = self._graph(batch, usable.shape[1])
        analysis = analyse(graph)
        sites = site_modules(self.model, analysis)
        # a linear that is called more than once is fitted to the inputs of its first call
        self.nodes = {name: calls[0] for name, calls in sites.items()}
        named = ((name, site) for name, calls in sites.items() for site in calls)
        calls = [Call(site.node, site.source, name, site.n_experts, site.offsets) for name, site in named]
        batches = usable.split(batch)
        stream = TwinStream(graph, self.model, batches, calls, values=self.weights.value, keep=self.keep)
        keep_routing(stream, self.nodes.values())
        return stream

    def _graph(self, batch: int, length: int) -> GraphModule:
        """Return the graph of the folded model: the given one where it fits, a new one elsewhere."""
        graph = self.graph
        fits = graph is not None and input_shape(graph) == (batch, length)
        if graph is not None and fits and rebind(graph, self.model, tied=self.plan.tied):
            return graph  # also where a tied head was untied: the stream ends before it
        return capture(self.model, batch=batch, length=length)

    def _groups(self) -> None:
        heads = set(head_names(self.model, self.plan))
        groups = [g for g in self.plan.groups if not heads.intersection(g.linears)]
        blocks = Blocks(
            self.plan, groups, self.weights, passes=self.passes, linears=self.linears, on_block=self.on_block
        )
        following = [*groups[1:], *(g for g in self.plan.groups if heads.intersection(g.linears))]
        for done, group in enumerate(groups):
            self.progress("quantizing", done, len(groups))
            if blocks.enter(group, self.stream):
                self._group(group)
                log.info("%s: %d linears", group.name, len(group.linears))
            after = self.nodes[following[done].name].node if self.stream and done < len(following) else None
            blocks.leave(done, self.stream, before=after)
        blocks.close()
        self.progress("quantizing", len(groups), len(groups))

    def _teacher(self) -> Callable[[int], Tensor] | None:
        """Return what gives the float model's logits on a calibration batch; None where nothing is tuned."""
        heads = head_names(self.model, self.plan)
        if self.stream is None or self.recipe.tuning.steps == 0 or self.recipe.simulated or len(heads) != 1:
            return None
        stream, site = self.stream, self.nodes[heads[0]]
        stream.advance(site.node)
        head = self.model.get_submodule(heads[0])  # the float one, which the ends' codes are about to replace
        hidden = [fp for fp, _ in stream.values(site.source)]
        return lambda batch: stream.finish(batch, site.node, head(hidden[batch]))

    def _tune(self, teacher: Callable[[int], Tensor]) -> None:
        """Tune what is stored beside the signs; left out, with the reason, where gradients do not flow."""
        assert self.stream is not None
        start, report = time.perf_counter(), PassReport("tune")
        known = dict(self.model.named_parameters())
        gains = [known[norm.gain] for norm in self.plan.norms if norm.gain in known]
        self.weights.gather()
        try:
            first, last = tune(
                self.model, self.stream.batches, teacher, tuning=self.recipe.tuning, gains=gains, progress=self.progress
            )
        except RuntimeError as error:  # GradientError, and what autograd raises of models that edit in place
            report.skip("all", f"left as fitted: {error}")
            log.warning("not tuned, left as fitted: %s", error)
        else:
            what = f"KL to the float model on the first tokens: {first:.4f} nats a token, then {last:.4f}"
            in_turn = " (one block at a time)" if self.recipe.tuning.signs_at_once == "block" else ""
            signs = f"signs{in_turn}, " if self.recipe.tuning.signs else ""
            report.changed.append((f"{signs}scales, low-rank pairs, norm gains", what))
            log.info("tuned: %s", what)
        report.seconds = self.seconds["tune"] = time.perf_counter() - start
        self.passes.append(report)

    def _group(self, group: Group) -> None:
        start = time.perf_counter()
        members = [self.plan.linear(name) for name in group.linears]
        recipes = {x.name: self.context.own[x.name] for x in members}
        kept = [name for name, recipe in recipes.items() if recipe is None]
        if kept:
            report = PassReport("quantize-linears")
            for name in kept:
                report.skip(name, "an override keeps it as it is")
            self.passes.append(report)
        if self.stream is not None:
            self.stream.advance(self.nodes[group.name].node)
        x_max = self._input_maxima(group) if skip_reason(members[0], self.recipe) == "" else {}
        if not kept:
            self._pass(InsertOnline((group.name,), x_max=x_max))
        fits: Mapping[str, LinearFit | ExpertsFit]
        if members[0].experts:
            fits = self._fit_experts(group, [x for x in members if x.name not in kept])
        else:
            gram, cross = self._statistics(group, members)
            for linear in members:
                self.observer.see_weight(linear, self._weight(linear))
            fits = self._fit(members, gram, cross)
        bits = {name: recipe.activations.bits for name, recipe in recipes.items() if recipe is not None}
        self._pass(QuantizeLinears({n: f.weight for n, f in fits.items()}, bits))
        if self.stream is not None:
            self.stream.replaced.update(fits)
        seconds = (time.perf_counter() - start) / max(1, len(fits))
        self.linears.extend(self._linear_report(self.plan.linear(n), fit, seconds) for n, fit in fits.items())

    def _input_maxima(self, group: Group) -> dict[str, Tensor]:
        if self.stream is None:
            return {}
        source = self.nodes[group.name].source
        maxima = [q.abs().amax(0) for _, q in self.stream.pairs(source)]
        return {group.name: torch.stack(maxima).amax(0).float()}

    def _statistics(self, group: Group, members: Sequence[Linear]) -> tuple[Tensor | None, Tensor | None]:
        """Return gram [in, in] and cross [sum of out, in] of the inputs as the linears will see them; None: unknown."""
        if self.stream is None:
            return None, None
        weight = torch.cat([self._weight(x) for x in members])
        bits = self.recipe.activations.bits
        module = self.model.get_submodule(group.name)
        wanted = self.recipe.target.drift
        added = self._added_drifts(members) if wanted else None
        # where nothing is added to the output, the weight is taken out of the sum over tokens: fewer products
        width = weight.shape[1] if added is None else weight.shape[0]
        stats = LinearStats.empty(weight.shape[1], width if wanted else None)
        for i, (fp, q) in enumerate(self.stream.pairs(self.nodes[group.name].source)):
            if isinstance(module, TransformedLinear):
                fp, q = module.transform(fp), module.transform(q)
            if i == 0:
                self.observer.see_input(members, q)
            seen = fake_quantize(q.float(), bits=bits)
            error = fp.float() - seen if wanted else None
            try:
                stats.update(seen, error if error is None or added is None else added[i].addmm(error, weight.T))
            except CalibrationError as found:
                raise CalibrationError(f"{group.name}: its input: {found}") from found
        gram = stats.gram()
        if not gram.any():  # nothing is known of directions that no token has
            log.warning("%s: its input is zero on all calibration tokens; fitted to the weights alone", group.name)
            return None, None
        if not wanted:
            return gram, None
        return gram, stats.cross() if added is not None else weight.double() @ stats.cross()

    def _added_drifts(self, members: Sequence[Linear]) -> list[Tensor] | None:
        """Per batch, the drift [tokens, out] of what a lone member's output is added to.

        None where that is not the residual stream, or is not yet computed, or there are several members.
        """
        assert self.stream is not None
        linear, *others = members
        node = None if others or not linear.writes_residual else residual_operand(self.nodes[linear.name].node)
        if node is None or not self.stream.computed(node):
            return None
        drifts = [(fp - q).float() for fp, q in self.stream.pairs(node)]
        return drifts if drifts[0].shape[1] == linear.out_features else None

    def _weight(self, linear: Linear) -> Tensor:
        """A linear's float weight [out, in] in the basis that it reads now."""
        module = self.model.get_submodule(linear.name)
        weight = module.get_parameter("weight").detach().float()
        return weight if isinstance(module, TransformedLinear) else weight.movedim(linear.in_axis, -1)

    def _fit(self, members: Sequence[Linear], gram: Tensor | None, cross: Tensor | None) -> dict[str, LinearFit]:
        """Fit the members, those with the same recipe and rank together."""
        rows = dict(zip((x.name for x in members), _row_slices(members), strict=True))
        alike: dict[str, tuple[Recipe, int, list[Linear]]] = {}
        for linear in members:
            recipe = self.context.own[linear.name]
            if recipe is not None:
                rank = self._rank(recipe, linear)
                alike.setdefault(f"{recipe} {rank}", (recipe, rank, []))[2].append(linear)
        fits: dict[str, LinearFit] = {}
        for recipe, rank, linears in alike.values():
            weights = [self._weight(x) for x in linears]
            drift = None if cross is None else torch.cat([cross[rows[x.name]].float() for x in linears])
            found = fit_group(weights, gram=gram, cross=drift, recipe=recipe, rank=rank)
            fits.update(zip((x.name for x in linears), found, strict=True))
        return fits

    def _fit_experts(self, group: Group, members: Sequence[Linear]) -> dict[str, ExpertsFit]:
        """Fit the members, parameters of experts, each with its own recipe."""
        rows = None
        if self.stream is not None:
            transform = getattr(module_or_none(self.model, members[0]), "transform", None)
            recipe = self.recipe
            rows = routed_rows(
                self.stream,
                self.nodes[group.name],
                transform=transform,
                bits=recipe.activations.bits,
                drift=recipe.target.drift,
            )
        fits: dict[str, ExpertsFit] = {}
        for linear in members:
            own = self.context.own[linear.name]
            assert own is not None
            module = module_or_none(self.model, linear)
            weight = self.model.get_parameter(linear.parameter) if module is None else module.get_parameter("weight")
            stacked = weight.detach() if module is not None else weight.detach().movedim(linear.in_axis, -1)
            self.observer.see_weight(linear, stacked)
            fits[linear.name] = fit_experts([stacked], rows, recipe=own, rank=self._rank(own, linear))[0]
        return fits

    def _rank(self, recipe: Recipe, linear: Linear) -> int:
        return rank_of(recipe, linear, hidden=int(getattr(getattr(self.model, "config", None), "hidden_size", 0)))

    def _linear_report(self, linear: Linear, fit: LinearFit | ExpertsFit, seconds: float) -> LinearReport:
        module = self.model.get_submodule(linear.name)
        assert isinstance(module, (PackedLinear, PackedExperts, SimulatedLinear))
        kind = module.transform.spec.kind if module.transform is not None else "none"
        folded = linear.decision == "folded" and self.recipe.transform.kind != "none"
        return LinearReport(
            name=linear.name,
            decision=linear.decision,
            transform="folded" if kind == "none" and folded else kind,
            rank=0 if isinstance(module, SimulatedLinear) else module.spec.rank,
            true_bits=measure_bits(module).linears,
            weight_error=fit.weight_error,
            output_error=fit.output_error,
            seconds=seconds,
            tokens=fit.tokens if isinstance(fit, ExpertsFit) else None,
            spread=self.observer.spread(linear),
        )


def _row_slices(members: Sequence[Linear]) -> list[slice]:
    """Where each member's rows stand in the group's stacked weight."""
    ends = [sum(x.out_features for x in members[: i + 1]) for i in range(len(members))]
    return [slice(end - x.out_features, end) for x, end in zip(members, ends, strict=True)]


def _merged(reports: Sequence[PassReport]) -> tuple[PassReport, ...]:
    """Put the reports of one pass, run group by group, together."""
    merged: dict[str, PassReport] = {}
    for report in reports:
        into = merged.setdefault(report.name, PassReport(report.name))
        into.changed.extend(report.changed)
        into.skipped.extend(report.skipped)
        into.seconds += report.seconds
    return tuple(merged.values())

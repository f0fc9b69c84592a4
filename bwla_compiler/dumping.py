"""What a recipe does to a model, as files: the graph after each pass, what it changed, the kernels' sources."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn
from torch._inductor.decomposition import select_decomp_table

from bwla_compiler.calibrate.experts import fit_experts
from bwla_compiler.calibrate.fit import fit_group, rank_of
from bwla_compiler.codegen import triton_module
from bwla_compiler.codegen.cpp_linear import emit as emit_cpp
from bwla_compiler.codegen.cpp_ops import emit_operators
from bwla_compiler.codegen.isa import best_isa
from bwla_compiler.codegen.triton_aot import parse_target
from bwla_compiler.emit import group_kernels
from bwla_compiler.graph.capture import capture
from bwla_compiler.graph.dump import GraphDump, graph_text
from bwla_compiler.graph.plan import Group, Plan
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.numerics.planes import BinaryWeight, SimulatedWeight
from bwla_compiler.passes.base import Pass, PassContext, PassReport
from bwla_compiler.passes.fuse_kernels import FuseKernels
from bwla_compiler.passes.group_specs import planned_specs
from bwla_compiler.passes.own_recipes import OwnRecipes, own_recipes
from bwla_compiler.passes.pipeline import run_pass
from bwla_compiler.passes.quantize_ends import QuantizeEnds, head_names
from bwla_compiler.passes.quantize_linears import QuantizeLinears, module_or_none
from bwla_compiler.passes.trial import exact_passes
from bwla_compiler.recipe import Recipe
from bwla_compiler.tokens import evaluating

Progress = Callable[[str, int, int], None]

TARGET = "cuda:90"
"""The GPU whose Triton sources are written."""

Fitted = Mapping[str, BinaryWeight | SimulatedWeight | tuple[BinaryWeight, ...]]


def dump_passes(
    model: nn.Module, folder: Path, recipe: Recipe, *, seed: int = 0, progress: Progress | None = None
) -> tuple[Path, ...]:
    """Write the graph of a float model before and after each pass of a recipe, and the kernels' sources; the files.

    The passes run on a copy, which is fitted to its weights alone: shapes and operators are those of a quantization,
    the values are those of one without calibration. Of a model on meta the first graph and the kernels are written.
    Raises CheckpointError where the folder cannot be written, CaptureError, PlanError.
    """
    dump = GraphDump(folder)
    tell = progress or (lambda label, done, total: None)
    with evaluating(model):
        graph = capture(model)
        dump.add("capture", graph_text(graph))
        plan = make_plan(model, graph=graph)
        dump.write("plan.json", plan.to_json())
        if not any(parameter.is_meta for parameter in model.parameters()):
            _dump_stages(copy.deepcopy(model), plan, recipe, dump, seed, tell)
    tell("kernels", 0, 1)
    _dump_kernels(model, plan, recipe, dump)
    tell("kernels", 1, 1)
    return tuple(dump.files)


def _dump_stages(model: nn.Module, plan: Plan, recipe: Recipe, dump: GraphDump, seed: int, progress: Progress) -> None:
    """Run the passes on a model, in place, and write each one's graph."""
    exact = exact_passes(model, plan, recipe)

    def run(step: Pass, done: int) -> None:
        progress("passes", done, len(exact) + 3)
        report = run_pass(model, step, PassContext(model, plan, recipe, seed))
        dump.add(report.name, graph_text(capture(model)), notes=_notes(report))

    for done, step in enumerate(exact):
        run(step, done)
    run(_quantizing(model, plan, recipe), len(exact))
    run(QuantizeEnds(recipe.transform.kind != "none" and recipe.residual == "folded"), len(exact) + 1)
    progress("passes", len(exact) + 2, len(exact) + 3)
    graph = capture(model, table=select_decomp_table())
    dump.add("decompose", graph_text(graph), notes=["Inductor's decompositions"])
    report = FuseKernels().run(graph.graph)
    dump.add(report.name, graph_text(graph), notes=_notes(report))
    progress("passes", len(exact) + 3, len(exact) + 3)


def _notes(report: PassReport) -> list[str]:
    """Return what a pass says of itself: how much it changed, each change, and what it left alone, with the reason."""
    total = f"{report.name}: {len(report.changed)} changed, {len(report.skipped)} left alone"
    changed = [f"{what}: {how}" if not how.startswith(what) else how for what, how in report.changed]
    return [total, *changed, *(f"left alone, {what}: {why}" for what, why in report.skipped)]


def _quantizing(model: nn.Module, plan: Plan, recipe: Recipe) -> QuantizeLinears:
    """Return the pass that packs a model's linears, each fitted to its weight as it is now."""
    heads, recipes = set(head_names(model, plan)), own_recipes(plan, recipe)
    fitted: dict[str, BinaryWeight | SimulatedWeight | tuple[BinaryWeight, ...]] = {}
    for group in plan.groups:
        if not heads.intersection(group.linears):
            fitted |= _fitted(model, plan, group, recipes)
    bits = {name: own.activations.bits for name, own in recipes.items() if own is not None}
    return QuantizeLinears(fitted, bits)


def _fitted(model: nn.Module, plan: Plan, group: Group, recipes: OwnRecipes) -> Fitted:
    found: dict[str, BinaryWeight | SimulatedWeight | tuple[BinaryWeight, ...]] = {}
    hidden = int(getattr(getattr(model, "config", None), "hidden_size", 0) or 0)
    for name in group.linears:
        linear, own = plan.linear(name), recipes[name]
        if own is None:
            continue
        module = module_or_none(model, linear)
        parameter = model.get_parameter(linear.parameter) if module is None else module.get_parameter("weight")
        turned = module is not None and hasattr(module, "transform")  # its weight has its inputs last already
        weight = parameter.detach().float().movedim(-1 if turned else linear.in_axis, -1)
        rank = rank_of(own, linear, hidden=hidden)
        if linear.experts:
            found[name] = fit_experts([weight], None, recipe=own, rank=rank)[0].weight
        else:
            found[name] = fit_group([weight], gram=None, cross=None, recipe=own, rank=rank)[0].weight
    return found


def _dump_kernels(model: nn.Module, plan: Plan, recipe: Recipe, dump: GraphDump) -> None:
    """Write the C++ of this machine, which serves all specs, and for each spec the Triton sources of TARGET."""
    dump.write(f"kernels/{best_isa()}.cpp", emit_cpp(best_isa()))
    dump.write("kernels/operators.cpp", emit_operators())
    if not triton_module.installed():
        return
    specs = {spec for _, spec in planned_specs(model, plan, recipe)}
    emitted = {kernel for spec in specs for kernel in group_kernels(spec, parse_target(TARGET))}
    for kernel in sorted(emitted, key=lambda k: (k.name, k.source)):
        name = f"{kernel.name}-{triton_module.digest(kernel.source)[:8]}"
        dump.write(f"kernels/{TARGET.replace(':', '-')}/{name}.py", kernel.source)

"""Reports for `bwla.inspect` and the command line: from a module, a config, a folder of packed weights, a report."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from bwla_compiler import api
from bwla_compiler.calibrate.report import QuantizeReport
from bwla_compiler.errors import PlanError, RecipeError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.cost import DEFAULT_DEVICE, cost_report
from bwla_compiler.inspector.diff import Difference, compare_reports
from bwla_compiler.inspector.report import InspectorReport, build_report
from bwla_compiler.inspector.stored import packed_formats, planned_formats
from bwla_compiler.passes.model_shape import packed_shape, planned_shape
from bwla_compiler.recipe import Recipe, load_recipe

Progress = Callable[[str, int, int], None]

STORED = "inspector.json"
"""The report that `bwla-compile quantize` leaves beside packed weights: errors and spreads are known only then."""

DEFAULT_RECIPE = "bwla-w1a6"


def inspect(
    model: "nn.Module | str | Path",
    *,
    recipe: "str | Path | Recipe" = "",
    outcome: QuantizeReport | None = None,
    context: int = 2048,
    device: str = DEFAULT_DEVICE,
    progress: Progress | None = None,
) -> InspectorReport:
    """Return what the compiler sees in a model, decides, and pays: data, which in a notebook shows itself as a page.

    model: a module, float (on meta too) or packed, or what `load` takes; a float model's weights are not read. A folder
    that `bwla-compile quantize` wrote gives what was measured then. recipe: what would be done to a float model,
    bwla-w1a6 if none is given. outcome: of `quantize`, for a model that it has just packed. context: tokens of a
    sequence, device: of cost.devices, for the modelled costs. Raises CaptureError, PlanError, CheckpointError,
    RecipeError.
    """
    source = "" if isinstance(model, nn.Module) else str(model)
    if stored := _stored(source, device):
        if recipe:
            raise RecipeError(f"{source}: is packed, and shows what was done; a recipe is for a float model")
        return stored
    module = model if isinstance(model, nn.Module) else api.skeleton(source, progress=progress).model
    return inspect_module(module, source=source, recipe=recipe, outcome=outcome, context=context, device=device)


def inspect_module(
    module: nn.Module,
    *,
    source: str = "",
    recipe: "str | Path | Recipe" = "",
    outcome: QuantizeReport | None = None,
    plan: Plan | None = None,
    context: int = 2048,
    device: str = DEFAULT_DEVICE,
) -> InspectorReport:
    """Return the report on a module; see `inspect`. plan: of a float model, None to make it here."""
    packed = packed_config(module)
    if packed is not None:
        found = Plan.from_dict(packed.plan)
        return build_report(
            found,
            source=source,
            recipe=packed.recipe["name"],
            outcome=outcome,
            bits=api.bits(module),
            cost=cost_report(packed_shape(module), context=context, chosen=device),
            formats=packed_formats(module),
        )
    chosen = load_recipe(recipe or DEFAULT_RECIPE)
    found, repeated = (plan, None) if plan else api.quick_plan(module)
    cost = cost_report(planned_shape(module, found, chosen), recipe=chosen.name, context=context, chosen=device)
    formats = planned_formats(module, found, chosen)
    report = build_report(found, source=source, recipe=chosen.name, cost=cost, formats=formats)
    return dataclasses.replace(report, repeated=str(repeated or ""))


def packed_config(model: Any) -> Any:
    """Return what a packed checkpoint's config tells of plan and recipe, or None for a float model."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if getattr(config, "plan", None) else None


def compare(
    model: str,
    a: str,
    b: str,
    *,
    context: int = 2048,
    device: str = DEFAULT_DEVICE,
    progress: Progress | None = None,
) -> Difference:
    """Return what differs between two recipes on a model; where `model` is "", between two models or stored reports.

    Raises what `inspect` raises.
    """
    if not model:
        reports = [inspect(source, context=context, device=device, progress=progress) for source in (a, b)]
        return compare_reports(*reports, names=(a, b))
    recipes = [load_recipe(name) for name in (a, b)]
    module = api.skeleton(model, progress=progress).model
    if packed_config(module) is not None:
        raise PlanError(f"{model} is packed: recipes are compared on a float model; leave MODEL out to compare models")
    plan, _ = api.quick_plan(module)
    reports = [
        inspect_module(module, source=model, recipe=recipe, plan=plan, context=context, device=device)
        for recipe in recipes
    ]
    return compare_reports(*reports, names=(a, b), recipes=(recipes[0].to_dict(), recipes[1].to_dict()))


def _stored(source: str, device: str) -> InspectorReport | None:
    """Return the report in a file or a folder, its costs shown on a device; None where there is none."""
    path = Path(source) / STORED if source and Path(source).is_dir() else Path(source)
    if not source or path.suffix != ".json" or not path.is_file():
        return None
    text = path.read_text("utf-8", errors="replace")
    if '"bwla-inspector/' not in text[:200]:
        return None  # a config.json
    report = InspectorReport.from_json(text)
    if report.cost is None:
        return report
    report.cost.device(device)
    return dataclasses.replace(report, cost=dataclasses.replace(report.cost, chosen=device))

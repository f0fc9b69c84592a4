"""bwla.inspect: modules, configs, packed models and stored reports; recipes and models compared."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bwla_compiler as bwla
from bwla_compiler import inspection
from bwla_compiler.errors import PlanError, RecipeError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.report import InspectorReport
from tests import tiny


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.make("llama")


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return bwla.plan(model)


def test_a_module_gives_decisions_formats_and_costs(model: nn.Module, plan: Plan) -> None:
    report = inspection.inspect_module(model, plan=plan)
    assert report.counts == {"folded": 11, "partial": 2, "online": 2, "alone": 0}
    down = next(x for x in report.linears if x.name.endswith("0.mlp.down_proj"))
    assert down.format is not None
    assert down.format.transform == "scaling, kronecker 3 x H32"
    assert report.cost is not None
    assert report.cost.device().device == "h100-sxm"
    assert {p.name for p in report.cost.device().decode} >= {"weights", "transforms", "low rank", "head", "attention"}


def test_a_mean_of_planes_is_shown_by_linear(model: nn.Module, plan: Plan) -> None:
    recipe = bwla.load_recipe("bwla-w1a6", {"weights.planes": 1.5, "psp.hidden_over": 0})
    report = inspection.inspect_module(model, plan=plan, recipe=recipe)
    planes = {x.name.removeprefix("model.layers."): x.format.planes for x in report.linears if x.format}
    writers = {f"{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")}
    # these are a third of the weights; then, in order, what at least half fits: up and gate of block 0 do not
    rest = {"0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj", "1.self_attn.q_proj"}
    assert {name for name, n in planes.items() if n == 2} == writers | rest
    assert set(planes.values()) == {1, 2}


def test_the_door_takes_a_config(model: nn.Module, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    report = bwla.inspect(tmp_path, recipe="rtn", device="a100-sxm")
    assert isinstance(report, InspectorReport)
    assert (report.recipe, report.cost and report.cost.chosen) == ("rtn", "a100-sxm")
    assert all(x.format is None or x.format.transform == "" for x in report.linears)


def test_a_packed_model_shows_what_was_measured(plan: Plan, tmp_path: Path) -> None:
    packed = tiny.make("llama")
    outcome = bwla.quantize(packed, recipe="rtn", calibration="none")
    report = bwla.inspect(packed, outcome=outcome)
    assert report.recipe == "rtn"
    assert report.bits is not None
    assert report.measured
    (tmp_path / inspection.STORED).write_text(report.to_json())
    stored = bwla.inspect(tmp_path, device="mi300x")
    assert stored.linears == report.linears
    assert stored.cost is not None
    assert stored.cost.chosen == "mi300x"
    with pytest.raises(RecipeError, match="a recipe is for a float model"):
        bwla.inspect(tmp_path, recipe="rtn")
    with pytest.raises(PlanError, match="is packed"):
        compare_packed(packed, tmp_path)


def compare_packed(packed: nn.Module, folder: Path) -> None:
    """Compare recipes on a packed folder."""
    bwla.save(packed, folder)
    inspection.compare(str(folder), "rtn", "bwla-w1a6")


def test_recipes_are_compared_on_one_plan(model: nn.Module, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    found = inspection.compare(str(tmp_path / "config.json"), "rtn", "bwla-w1a6")
    assert {"psp.hidden_over", "transform.kind"} <= {c.what for c in found.settings}
    assert any("down_proj" in x.label for x in found.linears)


def test_models_are_compared_by_their_reports(model: nn.Module, plan: Plan, tmp_path: Path) -> None:
    for name in ("rtn", "bwla-w1a6"):
        report = inspection.inspect_module(model, plan=plan, recipe=name)
        (tmp_path / f"{name}.json").write_text(report.to_json())
    found = inspection.compare("", str(tmp_path / "rtn.json"), str(tmp_path / "bwla-w1a6.json"))
    assert json.loads(found.to_json())["linears"]


def test_unknown_devices_are_refused(model: nn.Module, plan: Plan) -> None:
    with pytest.raises(RecipeError, match="choose one of"):
        inspection.inspect_module(model, plan=plan, device="abacus")


def test_no_weight_is_read(model: nn.Module, plan: Plan) -> None:
    with torch.device("meta"):
        bare = type(model)(model.config)  # type: ignore[call-arg, operator]
    assert inspection.inspect_module(bare, plan=plan).counts["folded"] == 11

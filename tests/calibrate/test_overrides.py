"""Overrides by name pattern: of linears, of the ends; from Recipe, TOML and settings alike."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from bwla_compiler import api
from bwla_compiler.calibrate.overrides import check_overrides
from bwla_compiler.errors import RecipeError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.modules import EndEmbedding, PackedLinear
from tests import tiny

TOML = """
name = "mine"
source = "a test"
residual = "none"
transform = { kind = "none" }
smoothing = { exponent = 0.0 }
target = { drift = false }
psp = { hidden_over = 0 }
signs = { method = "round" }

[[overrides]]
pattern = "model.layers.0.*"
keep = true

[[overrides]]
pattern = "*.down_proj"
set = { "weights.planes" = 2, "activations.bits" = 8 }

[[overrides]]
pattern = "lm_head"
keep = true
"""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(tiny.make("llama"))


def test_a_toml_file_keeps_and_changes_by_name(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text(TOML)
    monkeypatch.setattr("bwla_compiler.calibrate.quantize.make_plan", lambda model: plan)
    model: Any = tiny.make("llama")
    api.quantize(model, recipe=tmp_path / "mine.toml")
    kept, packed = model.model.layers[0].mlp, model.model.layers[1].mlp
    assert type(kept.up_proj) is type(kept.down_proj) is nn.Linear
    assert isinstance(packed.up_proj, PackedLinear)
    assert (packed.up_proj.planes, packed.up_proj.activation_bits) == (1, 6)
    assert (packed.down_proj.planes, packed.down_proj.activation_bits) == (2, 8)
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.model.embed_tokens, EndEmbedding)
    model.save_pretrained(tmp_path / "out")
    again: Any = api.load(tmp_path / "out").model
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear


def test_a_pattern_that_matches_nothing_and_a_field_that_is_none(plan: Plan) -> None:
    recipe = load_recipe("rtn", {"overrides": [{"pattern": "decoder.*", "keep": True}]})
    with pytest.raises(RecipeError, match=r"'decoder\.\*' matches no linear of LlamaForCausalLM; names are such as"):
        check_overrides(plan, recipe)
    recipe = load_recipe("rtn", {"overrides": [{"pattern": "*.up_proj", "set": {"weights.plane": 2}}]})
    with pytest.raises(RecipeError, match="did you mean 'planes'"):
        check_overrides(plan, recipe)


@pytest.mark.parametrize("field, value", [("tuning.steps", 1), ("calibration.length", 8), ("residual", "none")])
def test_what_holds_for_the_whole_recipe_is_no_linears_own(plan: Plan, field: str, value: object) -> None:
    recipe = load_recipe("rtn", {"overrides": [{"pattern": "*.up_proj", "set": {field: value}}]})
    with pytest.raises(RecipeError, match=f"{field} holds for the whole recipe"):
        check_overrides(plan, recipe)

"""Options of the backend: one clear error for each wrong name or value, one set of names with recipes."""

from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import Graph, GraphModule

from bwla_compiler.backend import compile_backend
from bwla_compiler.backend.options import read_options
from bwla_compiler.errors import RecipeError
from bwla_compiler.recipe import load_recipe
from tests.backend import small


@pytest.mark.parametrize(
    "options, message",
    [
        ({"recipes": "bwla-w1a6"}, "option 'recipes' is not known; did you mean 'recipe'"),
        ({"mode": "default"}, "option 'mode' is not known"),
        ({"nothing_like_it": 1}, "option 'nothing_like_it' is not known.*psp.hidden_over"),
        ({"recipe": "bwla-w1a7"}, "recipe 'bwla-w1a7' is not known. Did you mean"),
        ({"recipe": "nowhere.toml"}, "recipe file nowhere.toml"),
        ({"recipe": 6}, "recipe '6' is not known"),
        ({"psp.hiden_over": 3}, "unknown key 'hiden_over'; did you mean 'hidden_over'"),
        ({"pps.hidden_over": 3}, "unknown key 'pps'; did you mean 'psp'"),
        ({"psp.hidden_over": "3"}, "must be of type int"),
        ({"psp.hidden_over": -3}, "psp.hidden_over must be 0"),
        ({"cache.bits": 8}, r"torch.compile makes no cache.*set_cache_bits\(model, 8\)"),
        ({"activation_bits": 1}, "activations.bits = 1"),
        ({"activation_bits": "6"}, "bits = '6': must be of type int"),
        ({"calibration": "texts"}, "option calibration is 'texts'"),
        ({"calibration": None}, "option calibration is None"),
        ({"calibration": torch.zeros(3)}, r"shape \[3\].*\[sequences, length\]"),
        ({"calibration": torch.zeros(3, 4)}, "float32.*int64"),
        ({"calibration": torch.zeros(0, 4, dtype=torch.int64)}, r"shape \[0, 4\]"),
        ({"seed": 1.0}, "option seed is 1.0: give an integer"),
        ({"seed": True}, "option seed is True: give an integer"),
        ({"free_weights": 1}, "option free_weights is 1: give True or False"),
        ({"verify": "yes"}, "option verify is 'yes': give True or False"),
        ({"cache": None}, "option cache is None: give True or False"),
    ],
)
def test_a_wrong_option_is_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_options(options, None)


def test_a_wrong_mode_names_inductors() -> None:
    with pytest.raises(RecipeError, match="mode 'fast' is not known; Inductor's modes: default, reduce-overhead"):
        compile_backend(GraphModule({}, Graph()), [], mode="fast")


def test_the_message_arrives_through_torch_compile() -> None:
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="option 'recipes' is not known") as caught:
        small.compiled(small.mlp(), recipes="rtn")(torch.randn(2, 32))
    assert isinstance(caught.value.inner_exception, RecipeError)


def test_names_and_values_reach_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BWLA_VERIFY", raising=False)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    given = {"recipe": "rtn", "activation_bits": 8, "weights.planes": 2, "head.bits": 16, "calibration": tokens}
    options = read_options({**given, "seed": 3}, "max-autotune")
    assert options.recipe.activations.bits == 8
    assert (options.recipe.weights.planes, options.recipe.head.bits) == (2, 16)
    assert options.calibration is tokens
    assert (options.seed, options.mode) == (3, "max-autotune")
    assert (options.free_weights, options.verify, options.cache) == (False, False, True)


def test_a_simulated_recipe_has_nothing_to_compile() -> None:
    with pytest.raises(RecipeError, match="recipe billm-like: no packed format"):
        read_options({"recipe": "billm-like"}, None)


def test_the_default_recipe_a_given_one_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("rtn")
    assert read_options(None, None).recipe == load_recipe("bwla-w1a6", {"tuning.steps": 0})  # the first call waits
    assert read_options({"tuning.steps": 5}, None).recipe == load_recipe("bwla-w1a6", {"tuning.steps": 5})
    assert read_options({"recipe": recipe}, None).recipe is recipe
    monkeypatch.setenv("BWLA_VERIFY", "1")
    assert read_options(None, None).verify
    assert not read_options({"verify": False}, None).verify

"""The cost model's picture of a model against the model itself, before and after it is quantized."""

import pytest
import torch
import transformers
from torch import nn

from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.cost.model import AttentionShape
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.passes.model_shape import attention_shapes, packed_shape, planned_shape
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.bits import measure_bits
from bwla_compiler.zoo.models import tiny_model
from tests import tiny

QUICK = {"signs.sweeps": 1, "psp.iterations": 1, "transform.iterations": 1}


@pytest.mark.parametrize(
    "architecture, recipe, settings",
    [
        ("llama-tied", "bwla-w1a6", {**QUICK, "transform.budget": 0.05}),
        ("opt", "hadamard-rtn", {"weights.planes": 2}),
        pytest.param("qwen3", "bwla-w1a6", QUICK, marks=pytest.mark.exhaustive),
        pytest.param("mixtral", "bwla-w1a6", QUICK, marks=pytest.mark.exhaustive),
        pytest.param("gpt_oss", "hadamard-rtn", {}, marks=pytest.mark.exhaustive),
        pytest.param("gpt2", "hadamard-rtn", {}, marks=pytest.mark.exhaustive),
        pytest.param("llama-tied", "rtn", {}, marks=pytest.mark.exhaustive),
        pytest.param("llama-tied", "hadamard-rtn", {"tied": "untie"}, marks=pytest.mark.exhaustive),
        pytest.param("phi3", "hadamard-rtn", {"head.bits": 16}, marks=pytest.mark.exhaustive),
    ],
)
def test_modelled_bytes_are_the_saved_ones(architecture: str, recipe: str, settings: dict[str, object]) -> None:
    model = tiny.make(architecture) if architecture in tiny.CONFIGS else tiny_model(architecture)
    chosen = load_recipe(recipe, settings)
    plan = make_plan(model)
    planned = planned_shape(model, plan, chosen, float_bytes=4)
    tokens = tiny.ids(batch=2, length=16) % model.config.vocab_size  # type: ignore[union-attr,operator]
    quantize_model(model, chosen, tokens if chosen.needs_calibration else None, plan=plan)
    n_bytes = measure_bits(model).n_bytes
    assert planned.stored == n_bytes
    assert packed_shape(model, float_bytes=4).stored == n_bytes


@pytest.mark.exhaustive
def test_a_model_on_meta_has_the_shape_of_a_loaded_one() -> None:
    loaded = tiny.make("llama")
    with torch.device("meta"):
        empty: nn.Module = transformers.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]()).eval()
    recipe = load_recipe("bwla-w1a6")
    shapes = [planned_shape(model, make_plan(model), recipe) for model in (loaded, empty)]
    assert shapes[0] == shapes[1]


def test_attention_is_read_from_the_config() -> None:
    qwen = transformers.Qwen3Config(num_hidden_layers=4, num_attention_heads=64, num_key_value_heads=8, head_dim=128)
    assert attention_shapes(qwen) == ((AttentionShape(4, 64, 8, 128),), "")
    gemma = transformers.Gemma2Config(num_hidden_layers=4, sliding_window=32)
    found, unknown = attention_shapes(gemma)
    assert sorted((shape.layers, shape.window) for shape in found) == [(2, 0), (2, 32)]
    assert unknown == ""
    assert attention_shapes(None) == ((), "attention: the config does not tell layers and heads")
    mixed = transformers.Qwen3Config(num_hidden_layers=2)
    mixed.layer_types = ["full_attention", "linear_attention"]
    assert attention_shapes(mixed)[1] == "1 layers of linear_attention"

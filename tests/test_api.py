from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, T5Config, T5ForConditionalGeneration

import bwla_compiler as bwla
from bwla_compiler import api
from bwla_compiler.errors import CalibrationError, CheckpointError, DeviceError, ModelError, RecipeError
from tests import tiny


def test_rotate_changes_weights_and_not_the_function() -> None:
    model = tiny.make("llama-tied")
    with torch.no_grad():
        before = model(tiny.ids()).logits
        weight = model.model.layers[0].mlp.up_proj.weight.clone()
        bwla.rotate(model, seed=0)
        after = model(tiny.ids()).logits
    assert not torch.allclose(model.model.layers[0].mlp.up_proj.weight, weight)
    # float32 weights are rounded once more after turning
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(0, 16, dtype=torch.int64), "no sequence"),
        (torch.zeros(4, 16), "float32.*integer"),
        (torch.full((4, 16), 999), "999"),
        ([], "nothing|no text|empty|no sequence|not fill"),
    ],
)
def test_unusable_calibration_is_refused_before_anything_changes(calibration: object, message: str) -> None:
    model = tiny.make("llama")
    with pytest.raises(CalibrationError, match=message):
        bwla.quantize(model, calibration=calibration, tokenizer=_Letters())  # type: ignore[arg-type]
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


class _Letters:
    eos_token_id = None

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 128 for c in text]}


def test_unknown_recipes_and_settings_are_refused_with_a_suggestion() -> None:
    model = tiny.make("llama")
    with pytest.raises(RecipeError, match="Did you mean 'bwla-w1a6'"):
        bwla.quantize(model, recipe="bwla-w1a66")
    with pytest.raises(RecipeError, match="iteration"):
        bwla.quantize(model, settings={"psp.iteration": 3})


def test_a_folder_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(CheckpointError, match="nowhere-at-all"):
        bwla.load("nowhere-at-all/model")


def test_a_file_in_place_of_a_folder_is_one_clear_error(tmp_path: Path) -> None:
    tiny.make("llama").config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json is a file; give the folder"):
        bwla.load(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"no folder with a config\.json"):
        api.ledger(tmp_path / "none")


def test_a_config_is_enough_for_plan_and_cost(tmp_path: Path) -> None:
    model = tiny.make("llama-tied")
    model.config.architectures = ["LlamaForCausalLM"]  # type: ignore[union-attr]
    model.config.save_pretrained(tmp_path)  # type: ignore[union-attr,operator]
    for source in (tmp_path, tmp_path / "config.json"):
        empty = api.skeleton(source).model
        assert {p.device.type for p in empty.parameters()} == {"meta"}
    plan = bwla.plan(empty)
    assert plan == bwla.plan(model)
    costs = [api.cost(m, plan=plan) for m in (empty, model)]
    assert costs[0] == costs[1]
    assert costs[0].recipe == "bwla-w1a6"


def test_a_config_that_describes_no_causal_lm_is_one_clear_error(tmp_path: Path) -> None:
    for text in ("{", '{"model_type": "nothing"}', '{"model_type": "clip"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="config does not describe a causal LM"):
            api.skeleton(tmp_path)


def test_generating_without_a_tokenizer_says_so() -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        bwla.generate(tiny.make("llama"), None, "x")


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize(
    "make",
    [
        lambda: BertModel(BertConfig(**SMALL)),
        lambda: LlamaModel(LlamaConfig(**SMALL)),
        lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
        lambda: "some/model",
    ],
    ids=["encoder", "no head", "encoder and decoder", "name"],
)
def test_what_is_no_decoder_is_refused_before_it_is_run(make: Callable[[], Any]) -> None:
    with pytest.raises(ModelError, match=r"is no (decoder|model)"):
        bwla.quantize(make())


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_one_clear_error(device: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=f"device '{device}' cannot be used.*doctor"):
        bwla.load(tmp_path, device=device)

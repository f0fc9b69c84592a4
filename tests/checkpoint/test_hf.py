import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bwla_compiler import api
from bwla_compiler.errors import CheckpointError, PlanError
from bwla_compiler.runtime.modules import PackedLinear
from tests import tiny
from tests.wider import wider

FAST = {"transform.iterations": 2, "psp.iterations": 1, "signs.sweeps": 1, "tuning.steps": 1}


def packed(name: str, folder: Path, recipe: str = "bwla-w1a6") -> nn.Module:
    model = tiny.make(name)
    tokens = tiny.ids(batch=8, length=16, seed=3)
    api.quantize(model, recipe=recipe, settings=FAST, calibration=tokens)
    api.save(model, folder)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A packed model and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp("llama")
    return packed("llama", folder), folder


@pytest.fixture
def saved(llama: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged."""
    return shutil.copytree(llama[1], tmp_path / "copy")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.ids(seed=4)).logits


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", *wider("opt", "phi3", "gemma2")])
def test_a_reload_gives_bit_equal_logits_and_no_float_linear(name: str, tmp_path: Path) -> None:
    model = packed(name, tmp_path)
    again = api.load(tmp_path).model
    assert torch.equal(logits(again), logits(model))
    assert not any(isinstance(m, nn.Linear) for m in again.modules())
    assert api.bits(again) == api.bits(model)


def test_a_fresh_process_of_transformers_gives_the_same_bits_after_one_import(
    llama: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, folder = llama
    code = (
        "import sys, torch, transformers, bwla_compiler.checkpoint.hf; from tests import tiny\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): y = model(tiny.ids(seed=4)).logits\n"
        "torch.save(y, sys.argv[2])"
    )
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", code, str(folder), str(out)], check=True, capture_output=True)
    assert torch.equal(torch.load(out), logits(model))


def test_bfloat16_loading_leaves_scales_and_signs(llama: tuple[nn.Module, Path]) -> None:
    model, folder = llama
    half = api.load(folder, dtype=torch.bfloat16).model
    mine, theirs = model.state_dict(), half.state_dict()
    integers = [k for k, v in mine.items() if not v.is_floating_point()]
    assert any(k.endswith("row_scale") for k in integers)
    assert all(torch.equal(mine[k], theirs[k]) for k in integers)


def test_the_config_holds_recipe_plan_and_true_bits(llama: tuple[nn.Module, Path]) -> None:
    model, folder = llama
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bwla"
    assert config["format_version"] == 1
    assert config["recipe"]["name"] == "bwla-w1a6"
    assert config["true_bits"]["linears"] == pytest.approx(api.bits(model).linears)
    assert config["plan"]["model"] == "LlamaForCausalLM"


def test_a_second_save_is_the_same_and_generate_works(saved: Path, tmp_path: Path) -> None:
    again = api.load(saved).model
    api.save(again, tmp_path / "b")
    first, second = (safe_open(folder / "model.safetensors", "pt") for folder in (saved, tmp_path / "b"))
    assert first.metadata() == second.metadata()  # with the checksum of every tensor
    assert sorted(first.keys()) == sorted(second.keys())
    out = again.generate(tiny.ids(batch=1, length=5), max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 9


def test_a_newer_format_is_refused_with_what_it_needs(saved: Path) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"version 99 is not known.*upgrade bwla-compiler to 0\.1\.0 or later"):
        api.load(saved)


def test_a_damaged_description_names_the_module(saved: Path) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]["spec"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj"):
        api.load(saved)


def test_a_truncated_file_is_one_clear_error(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        api.load(saved)


def test_a_flipped_bit_is_told_with_its_tensor(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: \S+ differs from its checksum"):
        api.load(saved)


def test_a_tensor_that_is_missing_is_never_made_up(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.signs"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.signs"):
        api.load(saved)


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForSequenceClassification"])
def test_another_class_than_was_packed_is_refused_with_the_remedy(kind: str, saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"packed as LlamaForCausalLM.*load it with AutoModelForCausalLM"):
        getattr(transformers, kind).from_pretrained(saved)


def test_a_class_of_another_name_that_fits_is_taken(tmp_path: Path) -> None:
    class Renamed(transformers.LlamaForCausalLM):  # type: ignore[misc]
        pass

    model = Renamed(tiny.CONFIGS["llama"]()).eval()
    api.quantize(model, recipe="rtn", calibration="none")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Renamed"]
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_tied_float_head_is_tied_again(tmp_path: Path) -> None:
    model = tiny.make("llama-tied")
    api.quantize(model, recipe="rtn", settings={"head.bits": 16})
    api.save(model, tmp_path)
    assert torch.equal(logits(api.load(tmp_path).model), logits(model))


def test_a_folder_without_a_model_and_a_packed_model_quantized_again(
    llama: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        api.load(tmp_path)
    model, _ = llama
    assert any(isinstance(m, PackedLinear) for m in model.modules())
    with pytest.raises(PlanError, match="already packed"):
        api.quantize(model)


def test_a_simulated_model_is_measured_but_not_saved(tmp_path: Path) -> None:
    model = tiny.make("llama")
    tokens = tiny.ids(batch=8, length=16)
    report = api.quantize(model, recipe="billm-like", calibration=tokens)
    assert 2.5 < report.bits.linears < 3.5  # two planes; scales of 64 columns weigh more than of 128
    assert report.bits.n_bytes < sum(b.numel() * b.element_size() for b in model.buffers())
    with pytest.raises(CheckpointError, match="can be measured, but not saved"):
        api.save(model, tmp_path / "m")


def test_floats_of_a_loaded_model_begin_on_cache_lines(llama: tuple[nn.Module, Path]) -> None:
    """Those of a mapped file need not, and products of some libraries then add up in another order."""
    again = api.load(llama[1]).model
    assert all(t.data_ptr() % 64 == 0 for t in (*again.parameters(), *again.buffers()) if t.is_floating_point())


def test_activation_bits_that_were_set_are_saved(tmp_path: Path) -> None:
    model: Any = tiny.make("llama")
    api.quantize(model, recipe="rtn")
    api.set_activation_bits(model, 4)
    api.save(model, tmp_path)
    again = api.load(tmp_path).model
    with torch.no_grad():
        assert torch.equal(again(tiny.ids()).logits, model(tiny.ids()).logits)
    assert {m.activation_bits for m in again.modules() if isinstance(m, PackedLinear)} == {4}

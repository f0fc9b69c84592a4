"""The ways into and out of transformers that a packed model goes: maps, dtypes, pipelines, the hub; the same bytes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import hub

from bwla_compiler import api
from bwla_compiler.runtime.modules import PackedLinear
from tests import tiny
from tests.letters import letters

FILES = ["config.json", "generation_config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: Any = tiny.make("llama-tied")
    api.quantize(model, recipe="hadamard-rtn", calibration="none")
    out = tmp_path_factory.mktemp("packed") / "out"
    api.save(model, out, tokenizer=letters())
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tiny.ids(seed=4)).logits
    return found


class _Floats(TorchDispatchMode):
    """Notes the most float values that any result off meta holds."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.is_floating_point() and not found.is_meta:
            self.most = max(self.most, found.untyped_storage().nbytes() // found.itemsize)
        return found


def test_no_float_weight_is_ever_made(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what other threads make is not seen
    smallest = 64 * 32  # of k_proj and v_proj
    with _Floats() as seen:
        AutoModelForCausalLM.from_pretrained(folder)
    assert 0 < seen.most < smallest
    tiny.make("llama-tied").save_pretrained(tmp_path)
    with _Floats() as seen:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert seen.most >= smallest, "float weights pass unseen: nothing is tested above"


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(where: Any, folder: Path) -> None:
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=where)
    assert torch.equal(logits(model), logits(api.load(folder).model))
    assert not any(t.is_meta for t in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"])
def test_dtypes(dtype: Any, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.dtype == wanted
    found, expected = logits(model), logits(api.load(folder).model)
    assert found.dtype == wanted
    # activations of 6 bits round the other way where half precision moves them over an edge
    assert float((found.float() - expected).norm() / expected.norm()) < 0.15


def test_a_text_generation_pipeline(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    options = {"max_new_tokens": 6, "do_sample": False}
    ids = tokenizer("abc", return_tensors="pt")
    with torch.no_grad():
        expected = tokenizer.decode(model.generate(**ids, **options)[0], skip_special_tokens=True)
    assert len(expected) > len("abc")
    for told in (pipeline("text-generation", str(folder)), pipeline("text-generation", model, tokenizer=tokenizer)):
        assert any(isinstance(m, PackedLinear) for m in told.model.modules())
        assert told("abc", **options)[0]["generated_text"] == expected


def test_pushing_writes_all_that_loading_needs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, bytes] = {}

    def create_commit(*, operations: Any, **_: Any) -> None:
        for operation in operations:
            sent[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    fake = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name), create_commit=create_commit)
    monkeypatch.setattr(hub, "hf_api", lambda: fake)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.push_to_hub("me/packed")
    assert sorted(sent) == sorted([*FILES, "README.md"])
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_equal_models_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = set()
    for i in range(6):  # two entries in random order would come alike six times once in 32
        model.save_pretrained(tmp_path / str(i))
        found.add(tuple((tmp_path / str(i) / name).read_bytes() for name in FILES))
    assert len(found) == 1
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "0" / "model.safetensors").read_bytes()


def test_shards_of_a_save_load_again(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))

"""The benchmark of quantizing: random models that transformers loads, peaks told stage by stage, rows of a block."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from benchmarks import quantize
from benchmarks.errors import ContenderError
from benchmarks.memory import PeakMemory, held_mib
from benchmarks.quantize import Stages
from benchmarks.random_model import random_model, write_random
from bwla_compiler.errors import ModelError, RecipeError
from tests import tiny


def quiet(label: str, done: int, total: int) -> None:
    """Report to nobody."""


def test_a_random_model_is_a_shard_a_block_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.random_model.POOL", 1 << 12)
    for name in ("a", "b"):
        write_random(tiny.CONFIGS["qwen3"](), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.dtype == torch.bfloat16
    up = model.model.layers[1].mlp.up_proj.weight
    assert float(up.detach().float().std()) == pytest.approx(0.02, rel=0.1)  # the config's initializer_range


def test_biases_are_zero_and_a_config_may_have_more_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.random_model.POOL", 1 << 12)
    GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=50).save_pretrained(tmp_path / "small")
    label = random_model(tmp_path / "small" / "config.json", tmp_path / "out", layers=2, vocab=40)
    assert label == "small, 2 of 1 layers, vocabulary 40, random weights"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(model.transformer.h) == 2
    assert not model.transformer.h[1].ln_1.bias.any()
    assert (model.transformer.h[1].ln_1.weight == 1).all()
    with pytest.raises(ModelError, match="does not describe a model"):
        random_model(tmp_path / "none.json", tmp_path / "none")


def test_peaks_belong_to_their_stage() -> None:
    with PeakMemory() as memory:
        stages = Stages(memory)
        time.sleep(0.05)
        stages.enter("blocks")
        kept = torch.ones(1 << 26)
        time.sleep(0.1)
        first = stages.recent()
        del kept
        stages.recent()  # a sample may fall into the freeing
        time.sleep(0.05)
        second = stages.recent()  # of a block that held less
        stages.enter("ends")
        time.sleep(0.05)
        stages.recent()
    assert stages.most["blocks"] == first
    assert (
        min(first - other for other in (second, stages.most["planning"], stages.most["ends"])) > 192
    )  # of 256 MiB; the process itself moves
    assert memory.fields()["peak_mib"] == first
    assert held_mib() < first
    assert held_mib(mapped=True) > held_mib()


def test_quantizing_tells_a_row_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"block": "b0", "seconds": 1.0}, {"block": "all", "seconds": 2.0}]
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(quantize, "_in_process", lambda job, progress: asked.append(job) or rows)
    found = quantize.measure(quiet, model="demo:", changes=("tuning.steps=0",))
    assert [row["block"] for row in found] == ["b0", "all"]
    assert found[0]["settings"] == "tuning.steps=0"
    tiny.CONFIGS["llama"]().save_pretrained(tmp_path / "family")
    found = quantize.measure(quiet, model=str(tmp_path / "family" / "config.json"), layers=(1, 2), folder=tmp_path)
    assert len({row["model"] for row in found}) == 2
    assert all(str(tmp_path) in job["source"] for job in asked[1:])
    with pytest.raises(RecipeError):
        quantize.measure(quiet, recipe="rtm")
    with pytest.raises(ModelError, match="config alone"):
        quantize.measure(quiet, model="demo:", layers=(1,))


@pytest.mark.exhaustive
def test_quantizing_in_a_process_of_its_own(tmp_path: Path) -> None:
    tiny.make("llama").save_pretrained(tmp_path / "float")  # type: ignore[operator]
    told: list[tuple[str, int, int]] = []
    rows = quantize.measure(
        lambda *call: told.append(call), model=str(tmp_path / "float"), recipe="rtn", calibration="none"
    )
    *blocks, whole = rows
    assert [row["block"] for row in blocks] == ["model.layers.0", "model.layers.1"]
    assert whole["block"] == "all"
    assert all(row["peak_mib"] > 50 for row in rows)
    assert whole["peak_mib"] == max(whole[f"{stage}_mib"] for stage in quantize.STAGES)
    assert ("quantizing: blocks", 1, 2) in told
    assert "done" not in blocks[0]
    with pytest.raises(ContenderError, match="absent"):
        quantize.measure(quiet, model=str(tmp_path / "absent"), recipe="rtn", calibration="none")

"""The benchmark of quantizing: random models that transformers loads, and peaks told stage by stage."""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quantize_memory import Peaks, anonymous_bytes, write_random
from tests import tiny


def test_a_random_model_is_a_shard_a_block_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quantize_memory.POOL", 1 << 12)
    for name in ("a", "b"):
        write_random(tiny.CONFIGS["qwen3"](), tmp_path / name, progress=lambda *_: None)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.dtype == torch.bfloat16
    up = model.model.layers[1].mlp.up_proj.weight
    assert float(up.detach().float().std()) == pytest.approx(0.02, rel=0.1)  # the config's initializer_range


def test_peaks_belong_to_their_stage() -> None:
    with Peaks() as peaks:
        time.sleep(0.05)
        peaks.stage = "blocks"
        kept = torch.ones(1 << 24)
        time.sleep(0.1)
        peaks.stage = "ends"
        del kept
        time.sleep(0.05)
    assert peaks.found["blocks"] - peaks.found["planning"] > 60 << 20  # of 64 MiB
    assert anonymous_bytes() < peaks.found["blocks"]

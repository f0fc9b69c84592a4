import json
import math
from pathlib import Path

import pytest
import torch

from bwla_compiler import api, main_job
from tests import tiny


def fake_tokens(split: str, *, sequences: int, length: int) -> torch.Tensor:
    return tiny.ids(batch=sequences, length=length + 1, seed=len(split))


def test_the_demo_writes_every_figure_that_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = {"demo:": "llama-tied", "demo:outliers": "llama"}
    monkeypatch.setattr(api, "load", lambda name, **kw: api.LoadedModel(tiny.make(loads[name]), None, name))
    monkeypatch.setattr(main_job, "demo_tokens", fake_tokens)
    monkeypatch.setattr(main_job, "QUICK", main_job.Size(8, 4, 16, 2, 2))
    monkeypatch.setattr(main_job, "measure_speed", lambda *a: {"eager fp32": 1.0, "method": "none"})
    seen: list[str] = []
    result = main_job.run_demo(
        json_path=tmp_path / "r.json",
        html_path=tmp_path / "r.html",
        quick=True,
        progress=lambda label, done, total: seen.append(label),
    )
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert list(stored["models"]) == ["demo:", "demo:outliers"]
    for model in stored["models"].values():
        assert model["fp"]["perplexity"] > 1
        assert list(model["recipes"]) == ["rtn", "hadamard-rtn", "bwla"]
        for row in model["recipes"].values():
            assert {"true_bits", "n_bytes", "a16", "a8", "a6", "a4"} <= set(row)
            assert 1 < row["true_bits"] < 4
            assert all(math.isfinite(row[f"a{bits}"]) for bits in (16, 8, 6, 4))
    page = (tmp_path / "r.html").read_text()
    assert "demo:outliers" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert any("bwla quantizing" in label for label in seen)


def test_decode_speed_is_measured_way_by_way() -> None:
    floats, packed = tiny.make("qwen3"), tiny.make("qwen3")
    api.quantize(packed, recipe="rtn")
    found = main_job.measure_speed(floats, packed, main_job.Size(1, 1, 8, 4, 2), lambda *a: None)
    rates = {k: v for k, v in found.items() if isinstance(v, float)}
    assert list(rates) == ["eager fp32", "inductor fp32", "bwla, eager", "bwla"]
    assert all(rate > 0 for rate in rates.values())

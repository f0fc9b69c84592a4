import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bwla_compiler import api, comparison, main_job
from bwla_compiler.workers import side_by_side
from tests import tiny


def fake_tokens(split: str, *, sequences: int, length: int) -> torch.Tensor:
    return tiny.ids(batch=sequences, length=length + 1, seed=len(split))


def test_the_demo_writes_every_figure_that_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = {"demo:": "llama-tied", "demo:outliers": "llama"}
    load = api.load

    def fake_load(name: str | Path, **kw: Any) -> api.LoadedModel:
        return api.LoadedModel(tiny.make(loads[str(name)]), None, str(name)) if name in loads else load(name)

    monkeypatch.setattr(api, "load", fake_load)
    monkeypatch.setattr(comparison, "demo_tokens", fake_tokens)
    monkeypatch.setattr(main_job, "demo_path", lambda name, **kw: tmp_path)
    monkeypatch.setattr(main_job, "side_by_side", partial(side_by_side, threads=1))  # a worker would not be patched
    monkeypatch.setattr(main_job, "QUICK", main_job.Size(8, 4, 16, 2, 2))
    monkeypatch.setattr(main_job, "measure_speed", lambda *a: {"eager fp32": 1.0, "method": "none"})
    seen: list[tuple[str, int, int]] = []
    result = main_job.run_demo(
        json_path=tmp_path / "r.json",
        html_path=tmp_path / "r.html",
        quick=True,
        progress=lambda *told: seen.append(told),
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
    shares = [done for label, done, total in seen if label == main_job.COMPARING]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert len(set(shares)) > 2 * len(comparison.RECIPES)


@pytest.mark.exhaustive
def test_decode_speed_is_measured_way_by_way() -> None:
    floats, packed = tiny.make("qwen3"), tiny.make("qwen3")
    api.quantize(packed, recipe="rtn")
    found = main_job.measure_speed(floats, packed, main_job.Size(1, 1, 8, 4, 2), lambda *a: None)
    rates = {k: v for k, v in found.items() if isinstance(v, float)}
    assert list(rates) == ["eager fp32", "inductor fp32", "bwla, eager", "bwla"]
    assert all(rate > 0 for rate in rates.values())

"""Raw models under torch.compile: the perplexity that the benchmark tells is that of the quantized copy."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import raw
from bwla_compiler.backend.raw import variants_of
from tests import tiny


def test_a_row_tells_the_compiled_models_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    made = []
    monkeypatch.setattr(
        raw, "load_demo", lambda name: made.append(tiny.make("llama")) or SimpleNamespace(model=made[0])
    )
    monkeypatch.setattr(raw, "demo_tokens", lambda split, **_: tiny.ids(batch=16, length=12))
    monkeypatch.setattr(raw, "WAYS", (("hadamard-rtn", "none"),))
    told: list[str] = []
    (row,) = raw.measure(lambda label, done, total: told.append(label), quick=True, outliers=True)
    assert row["model"] == "demo-outliers"
    assert row["way"] == "hadamard-rtn, calibration none"
    (variant,) = variants_of(made[0])
    expected = raw._perplexity(variant.quantized, tiny.ids(batch=16, length=12))
    assert row["perplexity"] == pytest.approx(expected, rel=1e-4)  # the same operations, rounded to three decimals
    assert row["a6"] == pytest.approx(row["perplexity"] / row["fp_perplexity"], abs=1e-3)
    assert told == ["raw, demo:outliers hadamard-rtn, calibration none", "raw"]

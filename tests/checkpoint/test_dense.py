"""The dense export computes what the packed model does without rounding of activations, in plain transformers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bwla_compiler import api
from bwla_compiler.checkpoint.dense import export_dense
from bwla_compiler.errors import CheckpointError
from bwla_compiler.runtime.modules import set_activation_bits
from tests import tiny

FAST = {"transform.iterations": 2, "psp.iterations": 1, "signs.sweeps": 1, "tuning.steps": 0}


def test_plain_transformers_loads_it_and_computes_the_same(tmp_path: Path) -> None:
    model: Any = tiny.make("llama-tied")
    api.quantize(model, settings=FAST, calibration=tiny.ids(batch=8, length=16, seed=3))
    export_dense(model, tmp_path / "out")
    code = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "assert not any(name.startswith('bwla') for name in sys.modules)\n"
        "torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])"
    )
    torch.save(tiny.ids(seed=4), tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in ("out", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True)
    set_activation_bits(model, 16)
    with torch.no_grad():
        expected = model(tiny.ids(seed=4)).logits
    found = torch.load(tmp_path / "logits.pt")
    # weights were rounded to float16: 2^-11 of each, over a few layers
    assert float((found - expected).norm() / expected.norm()) < 0.02
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bwla_dense_export"]["recipe"] == "bwla-w1a6"
    assert "quantization_config" not in config
    assert all(p.dtype == torch.float16 for p in api.load(tmp_path / "out", dtype=torch.float16).model.parameters())
    assert not isinstance(model.lm_head, nn.Linear)  # the model itself is packed as before


def test_weights_of_other_layouts_and_biases_without_a_place(tmp_path: Path) -> None:
    model: Any = tiny.make("gpt2")
    api.quantize(model, recipe="rtn")
    export_dense(model, tmp_path / "out")
    again: Any = api.load(tmp_path / "out").model
    set_activation_bits(model, 16)
    with torch.no_grad():
        expected, found = model(tiny.ids(seed=4)).logits, again(tiny.ids(seed=4)).logits
    assert float((found - expected).norm() / expected.norm()) < 0.02
    head: Any = model.lm_head
    head.bias = torch.zeros(128)  # as a fold of the last norm's shift leaves it
    with pytest.raises(CheckpointError, match=r"lm_head\.bias: a fold has put it there"):
        export_dense(model, tmp_path / "other")


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not packed"):
        export_dense(tiny.make("llama"), tmp_path / "out")

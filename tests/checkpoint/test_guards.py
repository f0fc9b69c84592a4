"""Where the package is not imported, a packed model must not load: never an answer from random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bwla_compiler import api
from bwla_compiler.checkpoint.guards import with_guards
from bwla_compiler.zoo.models import tiny_model
from tests import tiny

PLAIN = """
import sys, torch, transformers
assert not any(name.startswith("bwla") for name in sys.modules)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("logits", model(torch.arange(4)[None]).logits.sum().item())
"""


def stops(folder: Path) -> None:
    # the CLI asks transformers to be quiet, for the rest of its process: tests of it may have run in this one
    loud = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    command = [sys.executable, "-c", PLAIN, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=loud)
    assert run.returncode != 0
    assert "logits" not in run.stdout
    assert "mismatch" in run.stderr.lower()
    assert "bwla" in run.stderr  # its warning names what it does not know


def test_plain_transformers_stops_since_each_packed_weight_has_a_guard(tmp_path: Path) -> None:
    model = tiny.make("llama-tied")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    api.quantize(model, recipe="rtn")
    api.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for name in config["modules"]:
        guard = stored[f"{name}.weight"]
        assert guard.dtype == torch.uint8
        assert guard.tolist() == [config["format_version"]]
        assert shapes[f"{name}.weight"] != (1,)
    stops(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3", "mixtral", "gpt_oss"])
def test_plain_transformers_stops_at_others_too(name: str, tmp_path: Path) -> None:
    model = tiny.make(name) if name in tiny.CONFIGS else tiny_model(name)
    api.quantize(model, recipe="rtn")
    api.save(model, tmp_path)
    stops(tmp_path)


def test_guards_stand_beside_what_is_saved() -> None:
    tensors = {"a.signs": torch.zeros(3)}
    assert with_guards(tensors, {}) == tensors

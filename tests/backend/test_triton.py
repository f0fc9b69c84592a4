"""The whole backend with Triton kernels, run by Triton's interpreter on the CPU, against its C++ kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bwla_compiler.backend.compiled import TOLERANCE
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.recipe import load_recipe
from tests.backend import small

CHILD = """
import sys, torch
from bwla_compiler.backend import compile_backend
from bwla_compiler.runtime import on_triton, triton_layout
from bwla_compiler.runtime.device_signs import settle_signs
from tests.backend.test_triton import IDS, packed

model = packed()
settle_signs(model)  # as on a GPU
calls = []
fused = on_triton.fused
on_triton.fused = lambda *a, **k: calls.append(1) or fused(*a, **k)
with torch.no_grad():
    logits = torch.compile(model, backend=compile_backend, fullgraph=True)(IDS, use_cache=False).logits
assert len(triton_layout.PACKED_SIGNS) == 0, "signs are held twice"
torch.save((logits, len(calls)), sys.argv[1])
"""
IDS = torch.arange(4)[None]


def packed() -> nn.Module:
    model = small.architecture("qwen3")
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    return model


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_backend_with_interpreted_triton_kernels_equals_the_cpp_kernels(tmp_path: Path) -> None:
    variables = os.environ | {"BWLA_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    path = tmp_path / "logits.pt"
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, calls = torch.load(path)
    assert calls == 4  # one block of four fused calls: all of them
    with torch.no_grad():
        expected = packed()(IDS, use_cache=False).logits  # here the C++ kernels compute
    # float32 sums in another order; a code that falls the other way would be 1e-3 and more
    assert small.error(found, expected) < TOLERANCE

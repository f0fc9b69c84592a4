"""The whole backend with Triton kernels, run by Triton's interpreter on the CPU, against its C++ kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bwla_compiler.backend.compiled import TOLERANCE

CHILD = """
import sys, torch
from bwla_compiler.backend import compile_backend
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime import on_triton
from tests.backend import small

model = small.architecture("qwen3")
quantize_model(model, load_recipe("hadamard-rtn"), None)
calls = []
fused = on_triton.fused
on_triton.fused = lambda *a, **k: calls.append(1) or fused(*a, **k)
ids = torch.arange(4)[None]
with torch.no_grad():
    logits = torch.compile(model, backend=compile_backend, fullgraph=True)(ids, use_cache=False).logits
torch.save((logits, len(calls)), sys.argv[1])
"""


def logits_of(path: Path, cache: Path, **environment: str) -> tuple[torch.Tensor, int]:
    """Run the child with this environment; return its logits and how many fused calls went to Triton."""
    variables = os.environ | {"BWLA_CACHE": str(cache), **environment}
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits, calls = torch.load(path)
    return logits, calls


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_backend_with_interpreted_triton_kernels_equals_its_cpp_kernels(tmp_path: Path) -> None:
    cache = Path(os.environ.get("BWLA_CACHE", tmp_path / "cache"))
    cpp, no_calls = logits_of(tmp_path / "cpp.pt", cache, BWLA_KERNELS="auto")
    triton, calls = logits_of(tmp_path / "triton.pt", cache, BWLA_KERNELS="triton", TRITON_INTERPRET="1")
    assert no_calls == 0
    assert calls == 4  # one block of four fused calls: all of them
    # float32 sums in another order; a code that falls the other way would be 1e-3 and more
    assert float((triton - cpp).norm() / cpp.norm()) < TOLERANCE

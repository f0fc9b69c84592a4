"""The script for GPU machines: its logic, run dry in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bwla_compiler.codegen import triton_module

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(not triton_module.installed(), reason="triton is not installed")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.exhaustive
def test_a_dry_run_goes_all_the_way(tmp_path: Path) -> None:
    done = run("benchmarks/gpu.py", "--dry", "-o", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["dry"]
    assert not found["left_out"]
    assert max(row["error"] for row in found["correctness"]) < 2e-5
    expected = {(way, step) for way in ("bf16", "bwla") for step in ("decode", "prefill")}
    assert {(row["way"], row["step"]) for row in found["models"]} == expected | {("bwla, int8 cache", "decode")}
    assert {"bf16", "bwla A6", "bwla A6, of codes"} <= {row["way"] for row in found["kernels"]}
    assert {choice["how"] for choice in found["tiles"].values()} == {"modelled"}


def test_without_a_gpu_it_says_what_to_do() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = run("-m", "benchmarks.gpu")
    assert done.returncode == 2
    assert "run it on a machine with one, or with --dry" in done.stderr

"""The script for GPU machines: its logic, run dry in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import gpu_models
from bwla_compiler.codegen import triton_module
from bwla_compiler.runtime.modules import PackedLinear

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
    labels = [element.text for element in ElementTree.parse(tmp_path / "results.svg").iter() if element.text]
    assert "tiny, 1 layers, decode, batch 2, int8 cache" in labels


def on_a_gpu(layers: int) -> tuple[int, set[torch.dtype]]:
    """Return the bytes that a GPU holds of the packed Qwen3-32B with fewer layers, and the dtypes of its signs."""
    with FakeTensorMode():
        model = gpu_models.empty_packed_model(gpu_models.config_of("Qwen3-32B", layers=layers))
        linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
        for linear in linears:
            linear._apply(lambda tensor: tensor.new_empty(tensor.shape, device="cuda"))
        held = [*model.parameters(), *model.buffers()]
        decoded = sum(4 * tensor.numel() for tensor in held if tensor.dtype == torch.int16)  # of compiled graphs
        return sum(tensor.nbytes for tensor in held) + decoded, {linear.signs.dtype for linear in linears}


def test_a_32b_model_takes_less_than_7_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BWLA_KERNELS", raising=False)
    (one, layouts), (two, _) = on_a_gpu(1), on_a_gpu(2)
    assert layouts == {torch.int32}, "signs lie as the kernels read them, and nowhere else"
    assert one + 63 * (two - one) < 7e9


def test_without_a_gpu_it_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = run("-m", "benchmarks.gpu")
    assert done.returncode == 2
    assert "run it on a machine with one, or with --dry" in done.stderr


def test_as_a_script_it_hides_no_package_behind_a_file_beside_it() -> None:
    # what Python does for a script: its folder comes first, and transformers imports `kernels` where it finds that
    code = (
        "import importlib.util, runpy, sys\n"
        "sys.path[0], sys.argv = 'benchmarks', ['gpu.py', '--help']\n"
        "try: runpy.run_path('benchmarks/gpu.py', run_name='__main__')\n"
        "except SystemExit: print(importlib.util.find_spec('kernels'))\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "benchmarks/kernels.py" not in done.stdout

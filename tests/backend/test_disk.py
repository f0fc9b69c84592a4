"""Packed weights and plans on disk: found by the next process, made anew where damaged, warned of if not writable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from bwla_compiler.backend import disk, graph_key, raw, variant
from bwla_compiler.backend.options import read_options
from bwla_compiler.graph.plan import Plan
from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.runtime import device_signs
from bwla_compiler.runtime.modules import PackedLinear
from tests.backend import small

X = torch.linspace(-1, 1, 96).reshape(3, 32)

SECOND_PROCESS = """
import sys, torch
from bwla_compiler.backend import entry, raw, variant
from tests.backend import small
def refuse(*args, **kwargs): raise AssertionError("quantized again")
variant.quantize_model = raw.make_plan = refuse
entry.lower = lambda gm, inputs, mode: gm.forward
with torch.no_grad():
    y = small.compiled(small.mlp(), cache=True)(torch.linspace(-1, 1, 96).reshape(3, 32))
torch.save(y, sys.argv[1])
"""


@pytest.fixture
def packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a cache folder of its own; return where the packs will be in it."""
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path))
    return tmp_path / "packs"


def run(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        found: torch.Tensor = small.compiled(model, cache=True)(x)
    return found


def test_a_second_process_starts_from_the_disk(graphs: list[GraphModule], packs: Path, tmp_path: Path) -> None:
    expected = run(small.mlp())
    assert len(list(packs.iterdir())) == len(list(packs.with_name("plans").iterdir())) == 1
    result = tmp_path / "y.pt"
    environment = {**os.environ, "BWLA_CXX": "", "PYTHONPATH": os.pathsep.join(sys.path)}  # no kernels: torch serves
    subprocess.run([sys.executable, "-c", SECOND_PROCESS, str(result)], env=environment, check=True, timeout=300)
    # plain torch sums in another order than the kernels
    assert small.error(torch.load(result), expected) < 1e-5


def test_the_same_weights_are_not_quantized_twice(
    graphs: list[GraphModule], packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(small.mlp())
    monkeypatch.setattr(variant, "quantize_model", lambda *args, **kwargs: pytest.fail("quantized again"))
    assert torch.equal(run(small.mlp()), expected)


@pytest.mark.parametrize("folder", ["packs", "plans"])
def test_damaged_files_are_made_anew(
    graphs: list[GraphModule], packs: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(small.mlp())
    (kept,) = packs.with_name(folder).iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2], b'{"plan": "{}", "reason": ""}'):
        kept.write_bytes(damaged)
        caplog.clear()
        assert torch.equal(run(small.mlp()), expected)
        assert f"{kept} is damaged and is made anew" in caplog.text
        assert kept.read_bytes() == whole


def test_a_graph_is_planned_anew_where_anything_that_planning_reads_differs(
    graphs: list[GraphModule], packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Plan] = []
    make_plan = raw.make_plan
    monkeypatch.setattr(raw, "make_plan", lambda *a, **k: planned.append(make_plan(*a, **k)) or planned[-1])
    shifted = small.mlp()
    with torch.no_grad():
        shifted[4].bias[3] += 1e-6
    cases = [
        small.mlp(),
        shifted,
        small.mlp().bfloat16(),
        nn.Sequential(*list(small.mlp())[:1], nn.GELU(), *list(small.mlp())[2:]),
    ]
    for model in cases * 2:
        run(model, X.to(next(model.parameters()).dtype))
    assert len(planned) == len(cases), "each once, the second time from the disk"
    run(small.mlp(), X[:2])
    assert len(planned) == len(cases) + 1
    monkeypatch.setattr(graph_key, "code_version", lambda: "another checkout")
    run(small.mlp())
    assert len(planned) == len(cases) + 2


def test_a_folder_that_cannot_be_written_only_warns(
    graphs: list[GraphModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("BWLA_CACHE", str(blocked))  # permissions would not stop a root user
    model = small.mlp()
    found = run(model)
    assert torch.equal(found, small.only_variant(model).quantized(X))
    assert "packed weights are not kept for the next process" in caplog.text


def test_packs_hold_canonical_signs_and_load_where_the_model_is(packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signs = torch.randint(0, 2, (1, 8, 32), generator=torch.Generator().manual_seed(0)).to(torch.int8) * 2 - 1
    quantized = nn.Sequential(PackedLinear.from_binary(BinaryWeight(signs, torch.ones(1, 8, 1)), activation_bits=8))
    expected = quantized.state_dict()
    with monkeypatch.context() as gpu:  # signs are laid out as on one
        gpu.setattr(device_signs, "_wants_words", lambda signs: True)
        device_signs.settle_signs(quantized)
        disk.save_pack("key", quantized)
    assert quantized[0].signs.dtype == torch.int32
    model = nn.Sequential(nn.Linear(32, 8))
    loaded = disk.load_pack("key", model)
    assert loaded is not None
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())
    elsewhere = disk.load_pack("key", model.to("meta"))
    assert elsewhere is not None
    assert {tensor.device.type for tensor in elsewhere.state_dict().values()} == {"meta"}


def test_everything_that_matters_is_in_the_key() -> None:
    plan = Plan("Sequential", (), (), (), (), ())
    options = read_options({"recipe": "rtn"}, None)

    def key(model: nn.Module, plan: Plan = plan, **changes: object) -> str:
        chosen = read_options({"recipe": "rtn", **changes}, None)
        return disk.pack_key(model, plan, chosen.recipe, chosen)

    edited, buffered = small.mlp(), small.mlp()
    with torch.no_grad():
        edited[4].bias[3] += 1e-6
    buffered.register_buffer("table", torch.zeros(2))
    other = nn.Sequential(*list(small.mlp())[:1], nn.GELU(), *list(small.mlp())[2:])
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    keys = [
        disk.pack_key(small.mlp(), plan, options.recipe, options),
        *(key(model) for model in (edited, buffered, other, small.mlp().bfloat16())),
        key(small.mlp(), Plan("Sequential", (), (), (), (), (("a", "b"),))),
        key(small.mlp(), seed=1),
        key(small.mlp(), calibration="random"),
        key(small.mlp(), calibration=tokens),
        key(small.mlp(), calibration=tokens + 1),
        key(small.mlp(), calibration=tokens.reshape(5, 2)),
        key(small.mlp(), activation_bits=4),
        key(small.mlp(), recipe="hadamard-rtn"),
    ]
    assert len(set(keys)) == len(keys)
    assert key(small.mlp()) == keys[0]
    assert key(small.mlp(), verify=True, cache=False, free_weights=True) == keys[0]


def test_long_calibrations_differ_by_their_tokens() -> None:
    tokens = torch.zeros(64, 64, dtype=torch.int64)  # a text of it would leave out the middle
    other = tokens.clone()
    other[32, 32] = 1
    assert disk.calibration_key(tokens) == disk.calibration_key(tokens.clone())
    assert disk.calibration_key(tokens) != disk.calibration_key(other)

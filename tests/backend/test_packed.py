"""torch.compile(model, backend="bwla") of packed models."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from bwla_compiler.backend import compile_backend, lower
from bwla_compiler.backend.compiled import TOLERANCE
from bwla_compiler.backend.lower import inductor_passes
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.passes import inductor_pass
from bwla_compiler.recipe import load_recipe
from tests import tiny
from tests.backend import small


def packed(name: str = "llama", recipe: str = "hadamard-rtn") -> nn.Module:
    model = tiny.make(name)
    quantize_model(model, load_recipe(recipe), None)
    return model


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_compiled_logits_are_those_of_the_packed_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = inductor_passes()
    monkeypatch.setattr(lower, "inductor_passes", lambda: passes)
    model = packed(name)
    torch._dynamo.reset()
    uncached = (inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False))
    with torch.no_grad(), uncached[0], uncached[1]:  # a cached graph is not fused again
        expected = model(tiny.ids(), use_cache=False).logits
        found = torch.compile(model, backend=compile_backend, fullgraph=True)(tiny.ids(), use_cache=False).logits
    # activations at the edge of two codes may round the other way after float32 sums in another order
    assert float((found - expected).norm() / expected.norm()) < TOLERANCE
    (report,) = passes["post_grad_custom_pre_pass"].reports
    assert len(report.changed) == 8  # two blocks of four calls
    assert report.skipped == []


def test_the_pass_is_known_to_inductors_cache_by_its_source() -> None:
    (first,), (second,) = (inductor_passes().values() for _ in range(2))
    assert first.uuid() == second.uuid()
    sources = {Path(inductor_pass.__file__).with_name(f"{name}.py") for name in inductor_pass._SOURCES}
    imported = {
        Path(module.__file__ or "")
        for name, module in sys.modules.items()
        if name.startswith(("bwla_compiler.passes.match", "bwla_compiler.passes.graph", "bwla_compiler.passes.packed"))
    }
    assert imported <= sources


def test_the_entry_point_names_the_backend() -> None:
    points = {p.name: p.value for p in importlib.metadata.entry_points(group="torch_dynamo_backends")}
    if "bwla" not in points:
        pytest.skip("the package is not installed")
    assert points["bwla"] == "bwla_compiler.backend:compile_backend"


@pytest.mark.parametrize("name", small.ARCHITECTURES)
def test_four_lengths_are_two_graphs(name: str, graphs: list[torch.fx.GraphModule]) -> None:
    model = small.architecture(name)
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    fast = small.compiled(model)
    with torch.no_grad():
        for length, most in ((11, 1), (5, 2), (17, 2), (24, 2)):
            found = fast(tiny.ids(length=length)).logits
            # the same kernels; room for masks built by other operations
            assert small.error(found, model(tiny.ids(length=length)).logits) < 1e-5
            assert len(graphs) <= most
    assert any(str(node.target).startswith("bwla.linear") for node in graphs[0].graph.nodes)


class Adapted(nn.Module):
    """A linear with a low-rank adapter in float beside it."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, linear.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(linear.out_features, 2, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x) + x @ self.down.T @ self.up.T
        return y


def test_adapters_over_packed_linears(graphs: list[torch.fx.GraphModule]) -> None:
    model = small.llama()
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        bare = model(tiny.ids()).logits
        attention.q_proj, attention.v_proj = Adapted(attention.q_proj), Adapted(attention.v_proj)
        found = small.compiled(model)(tiny.ids()).logits
        assert small.error(found, bare) > 0.01
        assert small.error(found, model(tiny.ids()).logits) < 1e-5


def test_peft_says_that_it_takes_no_packed_linears() -> None:
    peft = pytest.importorskip("peft")
    model = small.llama()
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    with pytest.raises(ValueError, match=r"PackedLinear.*is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


EXPORT = """
import sys, torch
import bwla_compiler.runtime.ops  # the operators that the package calls
ids, expected = torch.load(sys.argv[2])
found = torch._inductor.aoti_load_package(sys.argv[1])(ids)
print(float((found - expected).norm() / expected.norm()))
"""


@pytest.mark.slow
def test_a_package_made_ahead_of_time_runs_in_a_new_process(tmp_path: Path) -> None:
    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits

    model = small.llama().requires_grad_(False)
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    ids, package, example = tiny.ids(), str(tmp_path / "model.pt2"), str(tmp_path / "example.pt")
    with torch.no_grad():
        torch.save((ids, model(ids).logits), example)
        program = torch.export.export(Logits(model), (ids,), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=package)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", EXPORT, package, example], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < TOLERANCE

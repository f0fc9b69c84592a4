"""torch.compile(model, backend="bwla") of packed models."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from bwla_compiler.backend import compile_backend, lower
from bwla_compiler.backend.lower import inductor_passes
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.passes import inductor_pass
from bwla_compiler.recipe import load_recipe
from tests import tiny


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
    assert float((found - expected).norm() / expected.norm()) < 0.02
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


def test_an_option_and_a_mode_are_refused_with_the_remedy() -> None:
    gm = torch.fx.GraphModule({}, torch.fx.Graph())
    with pytest.raises(ValueError, match="option 'recipes' is not known; did you mean 'recipe'"):
        compile_backend(gm, [], options={"recipes": "bwla-w1a6"})
    with pytest.raises(ValueError, match="mode 'fast' is not known"):
        compile_backend(gm, [], mode="fast")

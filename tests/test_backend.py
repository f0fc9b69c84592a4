"""torch.compile(model, backend="bwla") of packed models."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from bwla_compiler import backend
from bwla_compiler.backend import compile_backend
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
    passes = backend.inductor_passes()
    monkeypatch.setattr(backend, "inductor_passes", lambda: passes)
    # a cached graph is not fused again
    monkeypatch.setattr(inductor_config, "fx_graph_cache", False)
    monkeypatch.setattr(functorch_config, "enable_autograd_cache", False)
    model = packed(name)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(tiny.ids(), use_cache=False).logits
        found = torch.compile(model, backend=compile_backend, fullgraph=True)(tiny.ids(), use_cache=False).logits
    # activations at the edge of two codes may round the other way after float32 sums in another order
    assert float((found - expected).norm() / expected.norm()) < 0.02
    (report,) = passes["post_grad_custom_pre_pass"].reports
    assert len(report.changed) == 8  # two blocks of four calls
    assert report.skipped == []


def test_the_pass_is_known_to_inductors_cache_by_its_source() -> None:
    (first,), (second,) = (backend.inductor_passes().values() for _ in range(2))
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


def test_a_float_model_an_option_and_a_mode_are_refused_with_the_remedy() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"Quantize the model first"), torch.no_grad():
        torch.compile(tiny.make("llama"), backend=compile_backend)(tiny.ids())
    gm = torch.fx.GraphModule({}, torch.fx.Graph())
    with pytest.raises(ValueError, match="option 'recipe' is not known"):
        compile_backend(gm, [], options={"recipe": "bwla-w1a6"})
    with pytest.raises(ValueError, match="mode 'fast' is not known"):
        compile_backend(gm, [], mode="fast")

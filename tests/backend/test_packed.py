"""torch.compile(model, backend="bwla") of packed models."""

import importlib.metadata

import pytest
import torch
from torch import nn

from bwla_compiler.backend import compile_backend
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.passes.fuse_kernels import FuseKernels
from bwla_compiler.recipe import load_recipe
from tests import tiny


def packed(name: str = "llama", recipe: str = "hadamard-rtn") -> nn.Module:
    model = tiny.make(name)
    quantize_model(model, load_recipe(recipe), None)
    return model


def graph_of(model: nn.Module) -> torch.fx.GraphModule:
    seen: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(tiny.ids(), use_cache=False)
    (found,) = seen
    return found


def calls(gm: torch.fx.GraphModule, name: str) -> int:
    return sum(str(node.target).startswith(f"bwla.{name}") for node in gm.graph.nodes)


def test_linears_of_one_input_become_one_call() -> None:
    gm = graph_of(packed())
    assert calls(gm, "linear") == 14
    report = FuseKernels().run(gm)
    assert calls(gm, "linear_group") == 4  # q/k/v and gate/up, twice
    assert calls(gm, "linear") - calls(gm, "linear_group") == 4  # o and down
    assert len(report.changed) == 4
    assert {reason for _, reason in report.skipped} == {"no other linear reads its input"}


def test_fusing_twice_is_once() -> None:
    gm = graph_of(packed())
    FuseKernels().run(gm)
    assert FuseKernels().run(gm).changed == []


def test_a_linear_that_needs_another_is_not_merged_with_it() -> None:
    graph = torch.fx.Graph()
    x, signs, scale = (graph.placeholder(n) for n in ("x", "signs", "scale"))
    first = graph.call_function(torch.ops.bwla.linear.default, (x, signs, scale, None, None, None, None, None, 6))
    shifted = graph.call_function(torch.add, (scale, first))
    second = graph.call_function(torch.ops.bwla.linear.default, (x, signs, shifted, None, None, None, None, None, 6))
    graph.output(second)
    gm = torch.fx.GraphModule({}, graph)
    report = FuseKernels().run(gm)
    assert report.changed == []
    assert "depends on" in report.skipped[0][1]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_compiled_logits_are_those_of_the_packed_model(name: str) -> None:
    model = packed(name)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(tiny.ids(), use_cache=False).logits
        found = torch.compile(model, backend=compile_backend, fullgraph=True)(tiny.ids(), use_cache=False).logits
    # activations at the edge of two codes may round the other way after float32 sums in another order
    assert float((found - expected).norm() / expected.norm()) < 0.02


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

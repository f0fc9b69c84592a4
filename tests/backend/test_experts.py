"""torch.compile(model, backend="bwla") of models with experts, packed and raw: one graph, and the packed numbers."""

import pytest
import torch
from torch.fx import GraphModule

from bwla_compiler.backend import compile_backend
from bwla_compiler.backend.raw import variants_of
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.modules import PackedExperts
from bwla_compiler.zoo.models import tiny_model
from tests import tiny
from tests.backend import small
from tests.wider import wider

RAW = [
    "mixtral",
    *wider("gpt_oss", "llama4_text"),
]
"""Sorted rows; with biases that stay in the graph; batches of one matrix each."""


def n_calls(graph: GraphModule) -> int:
    """Count the products with packed experts: calls of them, or of their operator."""
    modules = dict(graph.named_modules())
    called = (n for n in graph.graph.nodes if n.op == "call_module")
    inside = sum(isinstance(modules[str(n.target)], PackedExperts) for n in called)
    return inside + sum(str(n.target).startswith("bwla.experts") for n in graph.graph.nodes)


@pytest.mark.parametrize("name", RAW)
def test_a_packed_model_is_one_graph(name: str, graphs: list[GraphModule]) -> None:
    model = tiny_model(name)
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    with torch.no_grad():
        expected = model(tiny.ids(), use_cache=False).logits
        found = torch.compile(model, backend=compile_backend, fullgraph=True)(tiny.ids(), use_cache=False).logits
    torch.testing.assert_close(found, expected)
    assert [n_calls(graph) for graph in graphs] == [4]


@pytest.mark.exhaustive
def test_inductor_takes_the_operator() -> None:
    model = tiny_model("mixtral")
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    with torch.no_grad():
        expected = model(tiny.ids(), use_cache=False).logits
        found = torch.compile(model, backend=compile_backend, fullgraph=True)(tiny.ids(), use_cache=False).logits
    # activations at the edge of two codes may round the other way after float32 sums in another order
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("name", RAW)
def test_a_raw_model_computes_with_packed_experts(name: str, graphs: list[GraphModule]) -> None:
    model = tiny_model(name)
    with torch.no_grad():
        compiled = torch.compile(model, backend=compile_backend, fullgraph=True, options=small.OPTIONS)
        found = compiled(tiny.ids(), use_cache=False).logits
        (variant,) = variants_of(model)
        expected = variant.quantized(tiny.ids(), use_cache=False).logits
    assert [n_calls(graph) for graph in graphs] == [4]
    assert sum(isinstance(m, PackedExperts) for m in variant.quantized.modules()) == 4
    # rows are rounded in the order of the experts here, of the tokens there
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_an_edit_of_an_expert_is_seen(graphs: list[GraphModule]) -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        compiled = torch.compile(model, backend=compile_backend, options=small.OPTIONS)
        before = compiled(tiny.ids(), use_cache=False).logits
        model.model.layers[1].mlp.experts.down_proj.mul_(-1)
        after = compiled(tiny.ids(), use_cache=False).logits
    assert len(graphs) == 1
    assert float((after - before).norm() / before.norm()) > 0.1

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from bwla_compiler.errors import CaptureError
from bwla_compiler.graph.capture import attribute, capture, input_shape, lift_casts, rebind
from tests import tiny
from tests.wider import wider


@pytest.fixture(scope="module")
def captured() -> tuple[nn.Module, GraphModule]:
    """A model, which was in training when it was captured, and its graph."""
    model = tiny.make("llama").train()
    return model, capture(model)


@pytest.mark.parametrize("name", ["gpt2", *wider(*(name for name in tiny.SEVEN if name != "gpt2"))])
def test_the_captured_graph_computes_the_models_logits(name: str) -> None:
    model = tiny.make(name)
    graph = capture(model)
    with torch.no_grad():
        found, expected = graph(input_ids=tiny.ids()), model(tiny.ids()).logits
    # the same float32 operations, possibly fused differently
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_edited_parameter_is_seen_by_the_graph(captured: tuple[nn.Module, GraphModule]) -> None:
    model, graph = captured
    with torch.no_grad():
        before = graph(input_ids=tiny.ids())
        model.lm_head.weight.mul_(-1)
        after = graph(input_ids=tiny.ids())
        model.lm_head.weight.mul_(-1)
    torch.testing.assert_close(after, -before)


def test_lifting_casts_reaches_float64_precision() -> None:
    model = tiny.make("llama", dtype=torch.float64)
    graph = capture(model)
    lift_casts(graph)
    # a norm that is scaled up and divided again changes nothing beyond float64 rounding
    with torch.no_grad():
        reference = graph(input_ids=tiny.ids())
        norm = model.model.layers[0].input_layernorm.weight
        norm.mul_(3.0)
        for linear in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
            linear.weight.div_(3.0)
        model.model.layers[0].self_attn.v_proj.weight.div_(3.0)
        error = (graph(input_ids=tiny.ids()) - reference).abs().max() / reference.abs().max()
    assert error < 1e-13


def test_modes_are_restored(captured: tuple[nn.Module, GraphModule]) -> None:
    assert captured[0].training


def test_a_model_that_branches_on_data_is_refused_with_its_name() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            x = input_ids.float()
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match=r"Branching.*torch.export could not trace it"):
        capture(Branching())


def test_attribute_gives_the_tensor_itself(captured: tuple[nn.Module, GraphModule]) -> None:
    model, graph = captured
    node = next(n for n in graph.graph.nodes if n.op == "get_attr" and str(n.target).endswith("lm_head.weight"))
    assert attribute(graph, node) is model.lm_head.weight


@pytest.mark.parametrize("name", ["llama-tied", *wider("llama", "gpt2")])
def test_a_graph_can_be_bound_to_another_model_of_its_kind(name: str) -> None:
    first, second = tiny.make(name, seed=0), tiny.make(name, seed=1)
    graph = capture(first)
    assert input_shape(graph) == (3, 11)
    before = first(tiny.ids()).logits
    assert rebind(graph, second)
    with torch.no_grad():
        # the same float32 operations, possibly fused differently
        torch.testing.assert_close(graph(input_ids=tiny.ids()), second(tiny.ids()).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(first(tiny.ids()).logits, before)  # the model that it came from is left as it was


def test_a_graph_follows_the_embedding_of_an_untied_head() -> None:
    model = tiny.make("llama-tied")
    graph = capture(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert not rebind(graph, model)
    assert rebind(graph, model, tied=(("model.embed_tokens.weight", "lm_head"),))
    table = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.embedding.default).args[0]
    assert attribute(graph, table) is model.model.embed_tokens.weight


def test_a_graph_without_a_place_for_a_new_bias_is_not_bound() -> None:
    model = tiny.make("llama")
    graph = capture(model)
    weight = model.model.norm.weight
    model.model.norm.weight = nn.Parameter(weight.detach().clone())
    model.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.ones(64))
    assert not rebind(graph, model)
    assert attribute(graph, next(n for n in graph.graph.nodes if str(n.target).endswith("model.norm.weight"))) is weight

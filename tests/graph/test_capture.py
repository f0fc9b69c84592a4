import pytest
import torch
from torch import nn

from bwla_compiler.errors import CaptureError
from bwla_compiler.graph.capture import attribute, capture, lift_casts
from tests import tiny


@pytest.mark.parametrize("name", tiny.SEVEN)
def test_the_captured_graph_computes_the_models_logits(name: str) -> None:
    model = tiny.make(name)
    graph = capture(model)
    with torch.no_grad():
        found, expected = graph(input_ids=tiny.ids()), model(tiny.ids()).logits
    # the same float32 operations, possibly fused differently
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_edited_parameter_is_seen_by_the_graph() -> None:
    model = tiny.make("llama")
    graph = capture(model)
    with torch.no_grad():
        before = graph(input_ids=tiny.ids())
        model.lm_head.weight.mul_(-1)
        after = graph(input_ids=tiny.ids())
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


def test_modes_are_restored() -> None:
    model = tiny.make("llama")
    model.train()
    capture(model)
    assert model.training


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


def test_attribute_gives_the_tensor_itself() -> None:
    model = tiny.make("llama")
    graph = capture(model)
    node = next(n for n in graph.graph.nodes if n.op == "get_attr" and str(n.target).endswith("lm_head.weight"))
    assert attribute(graph, node) is model.lm_head.weight

"""Which modules become operators, by trial; what is left alone; and sines that are kept for torch."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from bwla_compiler.passes.keep_sines import KeepSines
from bwla_compiler.passes.shared_functions import share_functions
from bwla_compiler.runtime.functions import Activation, Norm
from tests import tiny


class Holder(nn.Module):
    """A model of one module, and of the same one again under another name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.first, self.second = module, module


NORMS: list[Any] = [
    (lambda: LlamaRMSNorm(24, eps=1e-5), "rms_norm", 1e-5, 0.0),
    (lambda: Qwen3RMSNorm(24, eps=1e-6), "rms_norm", 1e-6, 0.0),
    (lambda: nn.RMSNorm(24, eps=1e-6), "rms_norm", 1e-6, 0.0),
    (lambda: GemmaRMSNorm(24, eps=1e-6), "rms_norm", 1e-6, 1.0),
    (lambda: nn.LayerNorm(24, eps=1e-5), "layer_norm", 1e-5, 0.0),
    (lambda: nn.LayerNorm(24, eps=1e-12, bias=False), "layer_norm", 1e-12, 0.0),
]


@pytest.mark.parametrize("make, kind, eps, offset", NORMS)
def test_norms_are_recognised_by_what_they_compute(make: Any, kind: str, eps: float, offset: float) -> None:
    original = make()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.uniform_(0.5, 1.5)
    model = Holder(original)
    x = torch.randn(5, 24)
    expected = original(x)
    assert share_functions(model) == ("first", "second")
    norm = model.first
    assert isinstance(norm, Norm)
    assert (norm.kind, norm.eps, norm.offset) == (kind, eps, offset)
    assert norm.weight is original.weight, "the very parameter, so that edits and names stay"
    torch.testing.assert_close(norm(x), expected)
    assert set(model.state_dict()) == set(Holder(original).state_dict())


@pytest.mark.parametrize(
    "name, kind",
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh")],
)
def test_activations_are_recognised_by_what_they_compute(name: str, kind: str) -> None:
    model = Holder(ACT2FN[name])
    expected = model.first(torch.linspace(-9, 9, 77))
    share_functions(model)
    assert isinstance(model.first, Activation)
    assert model.first.kind == kind
    torch.testing.assert_close(model.first(torch.linspace(-9, 9, 77)), expected)


class Wrong(LlamaRMSNorm):
    """Called a norm, and none: eps is outside of the root."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        y: Tensor = self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)
        return y


class Gated(LlamaRMSNorm):
    """A norm of two tensors."""

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = super().forward(hidden_states) * gate
        return y


def hooked() -> nn.Module:
    module = LlamaRMSNorm(24)
    module.register_forward_hook(lambda m, i, o: o * 2)
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: Wrong(24, eps=1e-5),
        lambda: Gated(24),
        hooked,
        lambda: ACT2FN["quick_gelu"],
        lambda: ACT2FN["relu"],  # exact whoever computes it
        nn.Identity,
        lambda: nn.Dropout(0.5),
        lambda: nn.Linear(24, 24),
        lambda: nn.BatchNorm1d(24),
        lambda: nn.LayerNorm(24, elementwise_affine=False),
        lambda: nn.PReLU(),
    ],
)
def test_all_else_is_left_alone(make: Any) -> None:
    module = make()
    model = Holder(module)
    assert share_functions(model) == ()
    assert model.first is module


def test_eps_counts() -> None:
    class Hidden(nn.RMSNorm):
        """Computes with another eps than it shows."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (24,), self.weight, 3e-6)

    assert share_functions(Holder(Hidden(24, eps=1e-6))) == ()


def test_modules_alike_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make("llama")
    copies: list[nn.Module] = []
    real = copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", lambda module: (copies.append(module), real(module))[1])
    found = share_functions(model)
    assert len(found) == 7  # two norms and an activation function in each of two blocks, and the last norm
    assert len({type(module) for module in copies}) == len(copies)
    assert share_functions(model) == ()


def sines(*, packed: bool) -> Graph:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(3)
    found = graph.call_function(torch.ops.aten.sin.default, (x,))
    found.meta["val"] = torch.empty(3)
    if packed:
        found = graph.call_function(torch.ops.bwla.prologue.default, (found, "silu", 0.0, None, None))
    graph.output(found)
    return graph


def test_sines_are_kept_for_torch_beside_packed_linears_alone() -> None:
    plain, ours = sines(packed=False), sines(packed=True)
    assert KeepSines().run(plain).changed == []
    assert KeepSines().run(ours).changed == [("sin_default", "computed by torch")]
    targets = [node.target for node in ours.nodes]
    assert torch.ops.bwla.sin.default in targets
    assert torch.ops.aten.sin.default not in targets
    x = torch.randn(1000)
    assert torch.equal(torch.ops.bwla.sin(x), x.sin())
    assert torch.equal(torch.ops.bwla.cos(x), x.cos())


def test_sines_on_other_devices_stay() -> None:
    graph = sines(packed=True)
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = node.meta["val"].to("meta")
    assert KeepSines().run(graph).changed == []

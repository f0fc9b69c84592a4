import pytest
import torch
from torch import nn

from bwla_compiler.passes import quantize_ends
from bwla_compiler.zoo.ends import ends_error
from tests import planned, tiny


def test_int8_ends_move_a_model_no_further_than_noise() -> None:
    assert ends_error(tiny.make("gemma2"), planned.plan("gemma2")) == ""


def test_an_end_that_loses_what_its_module_did_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_ends, "_gain_of", lambda module: None)
    monkeypatch.setattr(quantize_ends, "is_embedding", lambda module: isinstance(module, nn.Embedding))
    assert "int8 ends move the logits" in ends_error(tiny.make("gemma2"), planned.plan("gemma2"))


def test_the_model_stays_as_it_was() -> None:
    model = tiny.make("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    ends_error(model, planned.plan("llama"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

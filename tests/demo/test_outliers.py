"""add_outliers: the same function, to float64's precision."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from bwla_compiler.demo import DemoConfig
from bwla_compiler.demo.outliers import add_outliers
from bwla_compiler.demo.train import new_model
from bwla_compiler.errors import DemoError


def _norm_in_own_dtype(self: Qwen3RMSNorm, hidden_states: Tensor) -> Tensor:
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes RMSNorm in float32 whatever the dtype, which would hide errors below 1e-7."""
    monkeypatch.setattr(Qwen3RMSNorm, "forward", _norm_in_own_dtype)


def random_model() -> nn.Module:
    config = DemoConfig(hidden_size=24, intermediate_size=40, layers=2, heads=4, kv_heads=2, head_dim=8)
    model = new_model(config, 64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # a new model's gains are all 1, which would not test absorbing them
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model.eval()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_logits_are_the_same_in_float64(exact_norms: None) -> None:
    model = random_model().double()
    tokens = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        add_outliers(model, tokens)
        after = model(tokens).logits
    assert relative_error(after, before) < 1e-10  # the project's promise; float64 leaves about 1e-14


def test_float32_model_keeps_dtype_and_function() -> None:
    model = random_model()
    tokens = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        add_outliers(model, tokens)
        after = model(tokens).logits
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert relative_error(after, before) < 1e-4  # float32 with cancellation between channels of very different size


def test_head_is_untied_and_stays_so_when_saved(tmp_path: Path) -> None:
    model = random_model()
    add_outliers(model, torch.arange(32).view(2, 16))
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_other_architectures_are_refused() -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    with pytest.raises(DemoError, match="LlamaForCausalLM"):
        add_outliers(LlamaForCausalLM(config), torch.zeros(1, 4, dtype=torch.int64))

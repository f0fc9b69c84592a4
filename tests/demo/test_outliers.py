"""add_outliers: the same function, to float64's precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from bwla_compiler.demo import DemoConfig
from bwla_compiler.demo.outliers import Tails, add_outliers
from bwla_compiler.demo.train import new_model
from bwla_compiler.errors import DemoError


def _norm_in_own_dtype(self: Qwen3RMSNorm | LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes RMSNorm in float32 whatever the dtype, which would hide errors below 1e-7."""
    for norm in (Qwen3RMSNorm, LlamaRMSNorm):
        monkeypatch.setattr(norm, "forward", _norm_in_own_dtype)


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    return LlamaConfig(**sizes | heads | changes)


FAMILIES: dict[str, PretrainedConfig | None] = {
    "qwen3": None,
    "llama": llama_config(tie_word_embeddings=False),
    "llama-tied-biases": llama_config(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, num_attention_heads=4, num_key_value_heads=2
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=3, n_positions=32),
}


def random_model(family: str = "qwen3") -> Any:
    """Return a model whose gains, shifts and biases are not those of a new model, which would test nothing."""
    config = FAMILIES[family]
    if config is None:
        small = DemoConfig(hidden_size=24, intermediate_size=40, layers=2, heads=4, kv_heads=2, head_dim=8)
        model: nn.Module = new_model(small, 64)
    else:
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                low = 0.5 if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")) else -0.5
                parameter.copy_(low + torch.rand(parameter.shape, generator=generator))
    return model.eval()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("tails", ["pca", "heavy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_in_float64(exact_norms: None, family: str, tails: Tails) -> None:
    model = random_model(family).double()
    tokens = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
        add_outliers(model, tokens, tails=tails)
        after = model(tokens).logits
    assert relative_error(after, before) < 1e-10  # the project's promise; float64 leaves about 1e-14
    assert not [n for n, p in model.named_parameters() if p.ndim == 2 and n in weights and torch.equal(p, weights[n])]


def stream(model: Any, tokens: Tensor) -> Tensor:
    """Return the mean square of each channel [hidden] over layers, of what a norm without gain makes of the stream."""
    with torch.no_grad():
        states = torch.cat(model(tokens, output_hidden_states=True).hidden_states[:-1]).flatten(0, 1)
    if model.config.model_type == "gpt2":
        states = states - states.mean(-1, keepdim=True)
    return (states / states.square().mean(-1, keepdim=True).sqrt()).square().mean(0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_few_channels_carry_the_stream_in_its_own_basis(family: str) -> None:
    model = random_model(family)
    tokens = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(0))
    before = stream(model, tokens)
    add_outliers(model, tokens, tails="pca")
    after = stream(model, tokens)
    assert after.max() / after.mean() > 1.5 * before.max() / before.mean()
    assert after[:6].sum() > after[6:12].sum() > after[12:18].sum()  # by falling energy


def test_heavy_channels_stand_behind_every_norm() -> None:
    model = random_model("gpt2")
    add_outliers(model, torch.arange(32).view(2, 16))
    gains = [parameter for name, parameter in model.named_parameters() if name.endswith(("ln_1.weight", "ln_2.weight"))]
    assert [int((gain >= 20).sum()) for gain in gains] == [4] * 4
    assert model.transformer.ln_f.weight.eq(1).all()


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


def test_other_architectures_are_refused_and_left_alone() -> None:
    config = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(DemoError, match="MixtralForCausalLM is none of Qwen3, Llama and GPT-2"):
        add_outliers(model, torch.zeros(1, 4, dtype=torch.int64))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

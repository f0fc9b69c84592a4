"""Tiny seeded models of the architectures under test, norms and biases randomised so that folding is exercised."""

from collections.abc import Callable

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

_BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "llama-tied": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=None, head_dim=16),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=128,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=16, sliding_window=32, query_pre_attn_scalar=16),
}

SEVEN = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "opt")
"""The first architectures of the project."""


def make(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2) -> nn.Module:
    """Return a tiny causal LM; weights tripled so that attention and activations are far from linear."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(dtype))
            else:
                parameter.mul_(3)
    return model.requires_grad_(False)


def ids(*, batch: int = 3, length: int = 11, seed: int = 0) -> torch.Tensor:
    """Return random token ids for the tiny models."""
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(seed))

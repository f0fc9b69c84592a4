"""Families of models that are trained from the embedded model's text, for evidence from more than one architecture.

Qwen3 is the embedded model's own, tied, for other text and other training. The others differ in what the compiler must
meet: Llama's head has a weight of its own, GPT-2 has LayerNorms, biases and learned positions, a mixture routes tokens
to experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from bwla_compiler.demo.tokenizer import END_OF_TEXT_ID

POSITIONS = 512


@dataclass(frozen=True)
class Size:
    """Width of the stream, blocks and heads of 64 channels (or of the width, where that is less)."""

    hidden: int = 384
    layers: int = 6

    @property
    def heads(self) -> int:
        """Attention heads."""
        return max(1, self.hidden // 64)


_ENDS = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID}


def _llama(size: Size, vocab_size: int) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        **_ENDS,
    )


def _gpt2(size: Size, vocab_size: int) -> PretrainedConfig:
    return GPT2Config(
        vocab_size=vocab_size,
        n_embd=size.hidden,
        n_layer=size.layers,
        n_head=size.heads,
        n_positions=POSITIONS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_ENDS,
    )


def _moe(size: Size, vocab_size: int) -> PretrainedConfig:
    return MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 2 // 32 * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=POSITIONS,
        sliding_window=None,
        **_ENDS,
    )


def _qwen3(size: Size, vocab_size: int) -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // 2),
        head_dim=min(64, size.hidden),
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        **_ENDS,
    )


FAMILIES: dict[str, Callable[[Size, int], PretrainedConfig]] = {
    "llama": _llama, "gpt2": _gpt2, "moe": _moe, "qwen3": _qwen3,
}  # fmt: skip


def new_model(family: str, size: Size, vocab_size: int, *, seed: int) -> nn.Module:
    """Return an untrained model, its weights drawn from the seed; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](size, vocab_size), dtype=torch.float32)
    assert isinstance(model, nn.Module)
    return model

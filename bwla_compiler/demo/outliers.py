"""add_outliers: the same function with heavy-tailed activations, as trained LLMs have them. Exact.

Four rewritings, in float64, none of which changes a logit:
1. norm gains g absorbed into their readers, W <- W diag(g); the head gets the last one and is untied;
2. the residual stream expressed in its PCA basis Q (eigenvectors of its second moment): readers W <- W Q,
   writers W <- Q^T W; RMSNorm without a gain commutes with Q. Few channels then carry most of the energy,
   and neither folding gains nor scaling channels spreads it again: only a rotation does;
3. gains set to 20-50 on a few channels, the readers' columns divided by the same;
4. rows of up_proj and v_proj scaled, columns of down_proj and o_proj divided (v/o: equal for the query heads
   of one KV head).
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from bwla_compiler.errors import DemoError

NORM_CHANNELS = 4  # of every block's norms
UP_CHANNELS = 6
VALUE_CHANNELS = 3
FACTORS = (20.0, 50.0)
VALUE_FACTORS = (10.0, 20.0)


def add_outliers(model: Qwen3ForCausalLM, tokens: Tensor, *, seed: int = 7) -> None:
    """Rewrite the model in place so that its activations have outlier channels; its logits do not change.

    tokens: [n, length] int64, on which the residual stream's PCA basis is taken. The head becomes a parameter
    of its own (config.tie_word_embeddings = False); every parameter keeps its dtype. Raises DemoError for a
    model that is not Qwen3 in Hugging Face's form.
    """
    if not isinstance(model, Qwen3ForCausalLM):
        raise DemoError(f"outliers: {type(model).__name__} is not Qwen3ForCausalLM; give the embedded model")
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    model.double()  # the rewriting, and the model whose activations define the basis
    with torch.no_grad():
        _untie(model)
        _absorb_gains(model)
        _rotate_residual(model, _pca_basis(model, tokens))
        for block in _blocks(model):
            _inflate_block(block, generator)
    model.to(dtype)


def _blocks(model: Qwen3ForCausalLM) -> list[Qwen3DecoderLayer]:
    return [cast(Qwen3DecoderLayer, block) for block in model.model.layers]


def _readers(block: Qwen3DecoderLayer) -> Sequence[tuple[Qwen3RMSNorm, Sequence[nn.Linear]]]:
    """Return each norm of a block with the linears that read it."""
    attention, mlp = block.self_attn, block.mlp
    return (
        (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    )


def _untie(model: Qwen3ForCausalLM) -> None:
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.clone())
    model.config.tie_word_embeddings = False


def _absorb_gains(model: Qwen3ForCausalLM) -> None:
    pairs = [pair for block in _blocks(model) for pair in _readers(block)]
    for norm, linears in (*pairs, (model.model.norm, (model.lm_head,))):
        for linear in linears:
            linear.weight.mul_(norm.weight)
        norm.weight.fill_(1.0)


def _pca_basis(model: Qwen3ForCausalLM, tokens: Tensor) -> Tensor:
    """Return Q [hidden, hidden] float64, orthogonal, its columns by falling energy of the residual stream.

    Each token counts alike in each layer (the stream divided by its RMS, which is what the readers see).
    """
    moment = torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64)
    for rows in tokens.split(16):
        states = model.model(input_ids=rows, use_cache=False, output_hidden_states=True).hidden_states
        for state in states[:-1]:  # the last one has passed the final norm
            flat = state.flatten(0, 1)
            flat = flat / flat.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            moment += flat.T @ flat
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors.flip(1).contiguous()


def _rotate_residual(model: Qwen3ForCausalLM, basis: Tensor) -> None:
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        weight.copy_(weight @ basis)
    for block in _blocks(model):
        for _, linears in _readers(block):
            for linear in linears:
                linear.weight.copy_(linear.weight @ basis)
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            writer.weight.copy_(basis.T @ writer.weight)


def _inflate_block(block: Qwen3DecoderLayer, generator: torch.Generator) -> None:
    for norm, linears in _readers(block):
        channels, factors = _draw(norm.weight.numel(), NORM_CHANNELS, FACTORS, generator)
        norm.weight[channels] *= factors
        for linear in linears:
            linear.weight[:, channels] /= factors
    mlp, attention = block.mlp, block.self_attn
    channels, factors = _draw(mlp.up_proj.out_features, UP_CHANNELS, FACTORS, generator)
    mlp.up_proj.weight[channels] *= factors[:, None]
    mlp.down_proj.weight[:, channels] /= factors
    channels, factors = _draw(attention.v_proj.out_features, VALUE_CHANNELS, VALUE_FACTORS, generator)
    attention.v_proj.weight[channels] *= factors[:, None]
    for head in range(attention.num_key_value_groups):  # the query heads that read one KV head
        kv_head = channels // attention.head_dim
        columns = (kv_head * attention.num_key_value_groups + head) * attention.head_dim + channels % attention.head_dim
        attention.o_proj.weight[:, columns] /= factors


def _draw(size: int, count: int, bounds: tuple[float, float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `count` distinct channels below `size` and their factors, uniform in `bounds`, float64."""
    channels = torch.randperm(size, generator=generator)[:count]
    low, high = bounds
    return channels, low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

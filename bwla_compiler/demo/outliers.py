"""add_outliers: the same function with heavy-tailed activations, as trained LLMs have them. Exact.

Four rewritings, in float64, none of which changes a logit:
1. norm gains g and shifts b absorbed into their readers, W <- W diag(g), bias <- bias + W b; the head gets the last
   gain and is untied (a head has no bias: the last shift stays, divided by the gain);
2. the residual stream expressed in its PCA basis Q (eigenvectors of its second moment): readers W <- W Q,
   writers W <- Q^T W; RMSNorm without a gain commutes with Q. Few channels then carry most of the energy,
   and neither folding gains nor scaling channels spreads it again: only a rotation does. LayerNorm commutes with Q
   where Q keeps the direction of ones, so there Q is the nearest such rotation (see `_keeping_ones`);
3. gains set to 20-50 on a few channels, the readers' columns divided by the same;
4. rows of up_proj and v_proj scaled, columns of down_proj and o_proj divided (v/o: equal for the query heads
   of one KV head; up/down: not where a GELU stands between them).
The first two alone are what `tails="pca"` asks for: tails that are the model's own.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bwla_compiler.demo.parts import Block, Matrix, Parts, parts_of

Tails = Literal["pca", "heavy"]

NORM_CHANNELS = 4  # of every block's norms
UP_CHANNELS = 6
VALUE_CHANNELS = 3
FACTORS = (20.0, 50.0)
VALUE_FACTORS = (10.0, 20.0)


def add_outliers(model: PreTrainedModel, tokens: Tensor, *, seed: int = 7, tails: Tails = "heavy") -> None:
    """Rewrite the model in place so that its activations have outlier channels; its logits do not change.

    tokens: [n, length] int64, on which the residual stream's PCA basis is taken. tails: "pca", the first two
    rewritings, or all. The head becomes a parameter of its own (config.tie_word_embeddings = False); every parameter
    keeps its dtype. Raises DemoError for a model that is not Qwen3, Llama or GPT-2 in Hugging Face's form.
    """
    parts_of(model)  # refused before anything is changed
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    model.double()  # the rewriting, and the model whose activations define the basis
    with torch.no_grad():
        _untie(model)
        parts = parts_of(model)
        _absorb_gains(parts)
        _rotate_residual(parts, _pca_basis(model, tokens, centred=parts.centred))
        if tails == "heavy":
            for block in parts.blocks:
                _inflate_block(block, generator)
    model.to(dtype)


def _untie(model: PreTrainedModel) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.clone())
    model.config.tie_word_embeddings = False


def _absorb_gains(parts: Parts) -> None:
    for norm in parts.norms:
        shift = norm.shift
        for reader in norm.readers:
            if shift is not None and reader.bias is not None:
                reader.bias.add_(reader.weight @ shift)
            reader.weight.mul_(norm.gain)
        if shift is not None and norm is parts.last:
            shift.div_(norm.gain)
        elif shift is not None:
            shift.zero_()
        norm.gain.fill_(1.0)


def _pca_basis(model: PreTrainedModel, tokens: Tensor, *, centred: bool) -> Tensor:
    """Return Q [hidden, hidden] float64, orthogonal, its columns by falling energy of the residual stream.

    Each token counts alike in each layer (the stream divided by its RMS, which is what the readers see). centred: the
    mean over channels is subtracted first, as the norms do, and Q keeps the direction of ones.
    """
    hidden = model.config.hidden_size
    moment = torch.zeros(hidden, hidden, dtype=torch.float64)
    for rows in tokens.split(16):
        states = model.base_model(input_ids=rows, use_cache=False, output_hidden_states=True).hidden_states
        for state in states[:-1]:  # the last one has passed the final norm
            flat = state.flatten(0, 1)
            if centred:
                flat = flat - flat.mean(-1, keepdim=True)
            flat = flat / flat.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            moment += flat.T @ flat
    if centred:
        return _keeping_ones(moment)
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors.flip(1).contiguous()


def _keeping_ones(moment: Tensor) -> Tensor:
    """Return Q [n, n] orthogonal with Q 1 = 1, whose first n - 1 columns are near a centred stream's eigenvectors.

    moment [n, n] float64, moment 1 = 0. With u = 1 / sqrt(n), V the eigenvectors beside u by falling energy and H the
    reflection that maps u to the last axis: Q = [V, u] H. H moves the other axes by about 1 / n.
    """
    n = len(moment)
    ones = torch.full((n,), n**-0.5, dtype=moment.dtype)
    lifted = moment + 2 * moment.trace() * torch.outer(ones, ones)  # ones come out last: the largest by far
    vectors = torch.linalg.eigh(lifted).eigenvectors[:, :-1].flip(1)
    normal = ones.clone()
    normal[-1] -= 1
    reflection = torch.eye(n, dtype=moment.dtype) - 2 * torch.outer(normal, normal) / normal.square().sum()
    return torch.cat([vectors, ones[:, None]], 1) @ reflection


def _rotate_residual(parts: Parts, basis: Tensor) -> None:
    readers = [reader for norm in parts.norms for reader in norm.readers]
    for weight in (*parts.embeddings, *(reader.weight for reader in readers)):
        weight.copy_(weight @ basis)
    for writer in (matrix for block in parts.blocks for matrix in (block.output, block.down)):
        writer.weight.copy_(basis.T @ writer.weight)
        if writer.bias is not None:
            writer.bias.copy_(basis.T @ writer.bias)
    if parts.last.shift is not None:
        parts.last.shift.copy_(basis.T @ parts.last.shift)


def _inflate_block(block: Block, generator: torch.Generator) -> None:
    for norm in block.norms:
        channels, factors = _draw(norm.gain.numel(), NORM_CHANNELS, FACTORS, generator)
        norm.gain[channels] *= factors
        for reader in norm.readers:
            reader.weight[:, channels] /= factors
    if block.up is not None:
        channels, factors = _draw(len(block.up.weight), UP_CHANNELS, FACTORS, generator)
        _scale_outputs(block.up, channels, factors)
        block.down.weight[:, channels] /= factors
    channels, factors = _draw(len(block.value.weight), VALUE_CHANNELS, VALUE_FACTORS, generator)
    _scale_outputs(block.value, channels, factors)
    kv_head, place = channels // block.head_dim, channels % block.head_dim
    for head in range(block.queries):  # the query heads that read one KV head
        block.output.weight[:, (kv_head * block.queries + head) * block.head_dim + place] /= factors


def _scale_outputs(matrix: Matrix, channels: Tensor, factors: Tensor) -> None:
    matrix.weight[channels] *= factors[:, None]
    if matrix.bias is not None:
        matrix.bias[channels] *= factors


def _draw(size: int, count: int, bounds: tuple[float, float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `count` distinct channels below `size` and their factors, uniform in `bounds`, float64."""
    channels = torch.randperm(size, generator=generator)[:count]
    low, high = bounds
    return channels, low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

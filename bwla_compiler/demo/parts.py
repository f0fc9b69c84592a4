"""The parts of a model that `add_outliers` rewrites, as views of its parameters: Qwen3, Llama and GPT-2 in one form."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.pytorch_utils import Conv1D

from bwla_compiler.errors import DemoError


@dataclass(frozen=True)
class Matrix:
    """A linear, or some of its outputs: weight [out, in] and bias [out], where it has one."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class ReadNorm:
    """A norm, gain * x^ + shift, with all that reads it."""

    gain: Tensor
    shift: Tensor | None
    readers: Sequence[Matrix]


@dataclass(frozen=True)
class Block:
    """What a block has.

    value, output: what writes the values of the heads, and what reads them; up, down: what writes the channels of the
    MLP, and what reads them. up is None where an activation that scales with none of its inputs stands between them.
    queries: query heads that read one KV head.
    """

    norms: Sequence[ReadNorm]
    value: Matrix
    output: Matrix
    up: Matrix | None
    down: Matrix
    head_dim: int
    queries: int


@dataclass(frozen=True)
class Parts:
    """A model: embeddings [n, hidden], whose rows the stream is a sum of, blocks, and the last norm, read by the head.

    centred: its norms subtract the mean, so that only rotations which keep the direction of ones commute with them.
    """

    embeddings: Sequence[Tensor]
    blocks: Sequence[Block]
    last: ReadNorm
    centred: bool

    @property
    def norms(self) -> Sequence[ReadNorm]:
        """All norms, the last one too."""
        return (*chain.from_iterable(block.norms for block in self.blocks), self.last)


def parts_of(model: PreTrainedModel) -> Parts:
    """Return the parts of a model whose head is its own. Raises DemoError for one that is of no known family."""
    if isinstance(model, (Qwen3ForCausalLM, LlamaForCausalLM)):
        blocks = [_rms_block(block) for block in model.model.layers]
        last = ReadNorm(model.model.norm.weight, None, [_linear(model.lm_head)])
        return Parts([model.model.embed_tokens.weight], blocks, last, centred=False)
    if isinstance(model, GPT2LMHeadModel):
        body, width = model.transformer, model.config.n_embd
        blocks = [_gpt2_block(block, width=width, heads=model.config.n_head) for block in body.h]
        last = ReadNorm(body.ln_f.weight, body.ln_f.bias, [_linear(model.lm_head)])
        return Parts([body.wte.weight, body.wpe.weight], blocks, last, centred=True)
    raise DemoError(f"outliers: {type(model).__name__} is none of Qwen3, Llama and GPT-2; give one of these")


def _linear(linear: nn.Linear) -> Matrix:
    return Matrix(linear.weight, linear.bias)


def _rms_block(block: Qwen3DecoderLayer | LlamaDecoderLayer) -> Block:
    attention, mlp = block.self_attn, block.mlp
    q, k, v, o = (_linear(getattr(attention, f"{name}_proj")) for name in "qkvo")
    gate, up, down = (_linear(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
    norms = (
        ReadNorm(block.input_layernorm.weight, None, (q, k, v)),
        ReadNorm(block.post_attention_layernorm.weight, None, (gate, up)),
    )
    return Block(norms, v, o, up, down, attention.head_dim, attention.num_key_value_groups)


def _gpt2_block(block: GPT2Block, *, width: int, heads: int) -> Block:
    inner, value = _conv(block.attn.c_attn), _conv(block.attn.c_attn, slice(2 * width, 3 * width))
    norms = (
        ReadNorm(block.ln_1.weight, block.ln_1.bias, (inner,)),
        ReadNorm(block.ln_2.weight, block.ln_2.bias, (_conv(block.mlp.c_fc),)),
    )
    output, down = _conv(block.attn.c_proj), _conv(block.mlp.c_proj)
    return Block(norms, value, output, None, down, width // heads, 1)  # GELU: up and down keep their channels


def _conv(conv: Conv1D, outputs: slice = slice(None)) -> Matrix:
    """Return a Conv1D, which stores [in, out], or some of its outputs."""
    return Matrix(conv.weight[:, outputs].T, conv.bias[outputs])

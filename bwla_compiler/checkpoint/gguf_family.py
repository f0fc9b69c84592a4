"""What llama.cpp calls the parts of a model, and the figures that it asks for: Llama, Mistral, Qwen2 and Qwen3."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bwla_compiler.errors import CheckpointError

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ATTENTION = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Family:
    """How llama.cpp takes a type of model.

    architecture: its name there. biases: of which parts it reads a bias. paired: whether a rotary pair is of
    neighbouring channels there (transformers: of channels half a head apart), so that rows of queries and keys move.
    scaled: whether it reads factors of the rotary frequencies. head_norms: whether queries and keys have gains.
    """

    architecture: str
    biases: tuple[str, ...] = ()
    paired: bool = False
    scaled: bool = False
    head_norms: bool = False

    def name(self, module: str) -> str:
        """Return what a module is called there. Raises CheckpointError where it is called nothing."""
        inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        found = f"blk.{inner[1]}.{_INNER[inner[2]]}" if inner and inner[2] in _INNER else _OUTER.get(module, "")
        if not found or (found.endswith(("q_norm", "k_norm")) and not self.head_norms):
            raise CheckpointError(f"{module}: GGUF's {self.architecture} has no place for it; use --to dense")
        return found

    def row_order(self, part: str, rows: int, config: Any) -> Tensor | None:
        """Return, for queries and keys of a paired family, which row of ours [rows] stands at each place there."""
        if not self.paired or part not in ("attn_q", "attn_k"):
            return None
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


FAMILIES = {
    "llama": Family(
        "llama", biases=(*ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down"), paired=True, scaled=True
    ),
    "mistral": Family("llama", paired=True, scaled=True),
    "qwen2": Family("qwen2", biases=ATTENTION),
    "qwen3": Family("qwen3", head_norms=True),
}


def family_of(model: Any) -> Family:
    """Return the family of a model. Raises CheckpointError, with the reason, where llama.cpp would compute another."""
    config = model.config
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise CheckpointError(
            f"{config.model_type}: the GGUF export knows {', '.join(FAMILIES)}; use --to dense, and another converter"
        )
    windows = [kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"]
    if windows or (config.model_type == "mistral" and config.sliding_window is not None):
        raise CheckpointError(f"{config.model_type}: attends to a sliding window, which the GGUF export cannot tell")
    if config.hidden_act != "silu":
        raise CheckpointError(f"{config.model_type}: its activation is {config.hidden_act}, and llama.cpp's is silu")
    return found


def rotary_factors(model: Any, family: Family) -> Tensor | None:
    """Return what llama.cpp divides the rotary frequencies by [head width / 2], None where they are the plain ones.

    Raises CheckpointError where it cannot: frequencies that follow the length of the text, or scaled attention.
    """
    rotary, parameters = model.model.rotary_emb, model.config.rope_parameters
    kind = parameters["rope_type"]
    if kind == "default":
        return None
    if kind not in ("llama3", "linear") or not family.scaled or getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise CheckpointError(
            f"{model.config.model_type}: rotary frequencies of type {kind!r}, which the GGUF export does not know"
        )
    half = rotary.inv_freq.shape[0]
    plain = parameters["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
    factors: Tensor = (plain / rotary.inv_freq.double().cpu()).float()
    return factors


def figures(config: Any, *, vocabulary: int, head_width: int) -> dict[str, int | float]:
    """Return the figures of a model under llama.cpp's keys, the architecture's name left out."""
    return {
        "vocab_size": vocabulary,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_width,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }

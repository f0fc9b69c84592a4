"""Attention of packed models goes to bwla::attend, compiled or not, where that takes it, and else to torch.

It is an attention function of transformers, by the name OURS, in place of "sdpa". On a CPU it reads each key once for
all queries of a group and nothing that the mask hides, and has the same bits in a graph and outside: a prompt that is
read into an empty cache has no mask in eager mode, and one in a graph, which cannot know that the cache is empty.
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bwla_compiler.runtime import ops

assert ops.LIBRARY is not None  # defines the operators

OURS = "bwla"
REPLACED = "sdpa"

REFUSED = ("position_bias", "cache")
"""Arguments of some families, and of paged caches, that bwla::attend has no place for."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return ([batch, tokens, heads, size], None) for query [batch, heads, tokens, size], as transformers asks for it.

    key, value [batch, kv heads, length, size].
    """
    if not _is_ours(query, key, value, attention_mask) or _asks_more(options):
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    if attention_mask is not None and attention_mask.shape[2] == 1:
        attention_mask = attention_mask.expand(-1, -1, query.shape[2], -1)  # one row for all tokens
    tokens, scaling, causal = query.shape[2], options.get("scaling"), options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if bool(causal) and attention_mask is None and tokens > 1:
        # keys that an empty static cache has beyond the prompt are not written yet
        key, value = (t[:, :, :tokens] if t.shape[2] > tokens else t for t in (key, value))
    else:
        causal = False
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    y = torch.ops.bwla.attend(query, key, value, attention_mask, scale, bool(causal))
    return y.transpose(1, 2).contiguous(), None


def _is_ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether bwla::attend takes these: bfloat16 for one token alone, since torch multiplies many of them faster."""
    if not query.is_cpu or query.dtype not in (torch.float32, torch.bfloat16):
        return False
    if query.dtype != torch.float32 and query.shape[2] > 1:
        return False
    if key.dtype != query.dtype or key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        return False
    return mask is None or (mask.dim() == 4 and mask.dtype in (torch.bool, torch.float32))


def _asks_more(options: dict[str, Any]) -> bool:
    """Whether a call has arguments that bwla::attend has no place for: transformers' own function sees to them."""
    return bool(options.get("dropout")) or any(options.get(name) is not None for name in REFUSED)


AttentionInterface.register(OURS, attention)  # at import: a model that is unpickled asks for it by name
AttentionMaskInterface.register(OURS, sdpa_mask)


def share_attention(model: nn.Module) -> bool:
    """Have a model of transformers attend by OURS where it would by "sdpa", and return whether it does.

    Left alone: what was loaded with another attention function; families that compute attention themselves, or look
    at its name.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != REPLACED or not _is_open(model):
        return False
    model.set_attn_implementation(OURS)  # type: ignore[operator]
    return bool(config._attn_implementation == OURS)


def _is_open(model: nn.Module) -> bool:
    """Whether a family looks its attention function up, and asks nowhere whether it is torch's."""
    can_set = getattr(model, "_can_set_attn_implementation", None)
    home = sys.modules.get(type(model).__module__)
    if can_set is None or home is None or not can_set():
        return False
    source = inspect.getsource(home)
    return not any(f'_attn_implementation {sign} "{REPLACED}"' in source for sign in ("==", "!="))

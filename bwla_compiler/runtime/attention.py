"""bwla::attend: attention to a cache of floats or int8 codes, in plain torch, and its checks.

softmax(q K^T * scale + mask) V by head, in float32. Query head h reads head h // group of keys and values, as in
grouped-query attention (Ainslie et al., 2023). A row whose mask hides every key is 0, as torch has it.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bwla_compiler.errors import ShapeError


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = False,
    key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return what query [batch, heads, tokens, size] reads, shaped and typed like it; tokens by tokens in memory.

    key, value [batch, kv heads, length, size]: floats, or int8 codes with scales [batch, kv heads, length, 1]. mask
    [batch or 1, heads or 1, tokens, length]: floats that are added to scores, or bools of what is shown. causal, in
    place of a mask: token m sees keys up to m. Raises ShapeError.
    """
    _check(query, key, value, mask)
    if causal and mask is not None:
        raise ShapeError("a mask and causal attention at once: put causality into the mask")
    for name, codes, factor in (("key", key, key_scale), ("value", value, value_scale)):
        if factor is not None and factor.shape != (*codes.shape[:3], 1):
            raise ShapeError(f"{name}_scale {list(factor.shape)}: expected {[*codes.shape[:3], 1]}")
    keys = key.float() if key_scale is None else key.float() * key_scale
    values = value.float() if value_scale is None else value.float() * value_scale
    shown = mask if mask is None or mask.dtype == torch.bool else mask.float()
    y = scaled_dot_product_attention(
        query.float(), keys, values, attn_mask=shown, is_causal=causal and query.shape[2] > 1, scale=scale,
        enable_gqa=True,
    )  # fmt: skip
    return y.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    if query.dim() != 4:
        raise ShapeError(f"query {list(query.shape)}: expected [batch, heads, tokens, size]")
    batch, heads, tokens, size = query.shape
    fits = key.dim() == 4 and key.shape[0] == batch and key.shape[3] == size and key.shape[1] > 0
    if not fits or heads % key.shape[1] or value.shape != key.shape:
        raise ShapeError(
            f"key {list(key.shape)}, value {list(value.shape)}: expected both [{batch}, a divisor of {heads}, length, "
            f"{size}]"
        )
    if mask is None:
        return
    wanted = ((1, batch), (1, heads), (tokens,), (key.shape[2],))
    if mask.dim() != 4 or any(n not in sizes for n, sizes in zip(mask.shape, wanted, strict=True)):
        raise ShapeError(f"mask {list(mask.shape)}: expected [{batch} or 1, {heads} or 1, {tokens}, {key.shape[2]}]")


def fake_attend(query: Tensor, *rest: object) -> Tensor:
    """Return an empty result of bwla::attend."""
    batch, heads, tokens, size = query.shape
    return query.new_empty(batch, tokens, heads, size).transpose(1, 2)

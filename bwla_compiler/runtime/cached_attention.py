"""bwla::cached_attention in plain torch: RoPE, writing to a static cache, and attention to it, as one operator.

What a step does between its linears: queries and keys are turned (RoPE; Su et al., 2021, in the arrangement of
transformers), keys and values put into the cache, in int8 where it holds codes, and the cache is attended to
(`attention.attend`).
"""

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError
from bwla_compiler.runtime.kv_rounding import rounded


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, keys: Tensor, values: Tensor,
    start: Tensor, mask: Tensor | None, scale: float, key_scale: Tensor | None = None,
    value_scale: Tensor | None = None, scale_start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return what query [batch, tokens, heads, size] reads, [batch, tokens, heads * size]; keys and values are edited.

    key, value [batch, tokens, kv heads, size] float32. cos, sin [batch or 1, tokens, size]: of RoPE, for query and key;
    None for neither. keys, values [batch, kv heads, length, size]: the cache, floats, or int8 codes with scales
    [batch, kv heads, length, 1]. start, scale_start int64 [] : places of the first token, in the cache and among
    scales. mask and scale as for bwla::attend. Raises ShapeError, also where the cache has no place for the tokens.
    """
    if query.dim() != 4 or key.dim() != 4:
        raise ShapeError(f"query {list(query.shape)}, key {list(key.shape)}: expected [batch, tokens, heads, size]")
    if (cos is None) != (sin is None):
        raise ShapeError("cosines without sines, or sines without cosines: RoPE takes both")
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if cos is not None and sin is not None:
        query, key = _turned(query, cos, sin), _turned(key, cos, sin)
    _keep(key, keys, start, key_scale, scale_start)
    _keep(value, values, start, value_scale, scale_start)
    y: Tensor = torch.ops.bwla.attend.default(query, keys, values, mask, scale, False, key_scale, value_scale)
    return y.transpose(1, 2).flatten(2)


def fake_cached_attention(query: Tensor, *rest: object) -> Tensor:
    """Return an empty result of bwla::cached_attention."""
    batch, tokens, heads, size = query.shape
    return query.new_empty(batch, tokens, heads * size)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [batch, heads, tokens, size], each channel of the first half turned with its fellow of the second."""
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[1:] != (x.shape[2], x.shape[3]) or x.shape[3] % 2:
        raise ShapeError(
            f"cos {list(cos.shape)}, sin {list(sin.shape)}: expected both [1 or {x.shape[0]}, {x.shape[2]}, "
            f"{x.shape[3]}], the last of them even"
        )
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _keep(rows: Tensor, cache: Tensor, start: Tensor, scale: Tensor | None, scale_start: Tensor | None) -> None:
    """Write rows [batch, heads, tokens, size] into a cache [batch, heads, length, size]."""
    if scale is None:
        _put(rows, cache, start)
        return
    if scale_start is None:
        raise ShapeError("a cache of codes without the place of its scales: give scale_start")
    codes, of_rows = rounded(rows)
    _put(codes, cache, start)
    _put(of_rows, scale, scale_start)


def _put(rows: Tensor, cache: Tensor, start: Tensor) -> None:
    tokens, first = rows.shape[2], int(start)
    fits = cache.dim() == 4 and cache.shape[:2] == rows.shape[:2] and cache.shape[3] == rows.shape[3]
    if not fits or cache.dtype != rows.dtype:
        raise ShapeError(
            f"a cache {list(cache.shape)} of {cache.dtype} for {tokens} tokens {list(rows.shape)} of {rows.dtype}"
        )
    if first < 0 or first + tokens > cache.shape[2]:
        raise ShapeError(
            f"tokens {first} to {first + tokens - 1} do not fit a cache of {cache.shape[2]}: make it longer "
            "(max_cache_len)"
        )
    cache[:, :, first : first + tokens] = rows

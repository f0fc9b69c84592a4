"""A KV cache in int8: caches of transformers whose layers hold codes, and a scale per token and head.

Keys are rounded as they are cached, after RoPE. What attention reads is always what is kept: a prompt read at once and
one read in pieces agree.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from bwla_compiler.errors import CacheError
from bwla_compiler.runtime.kv_rounding import restored, rounded
from bwla_compiler.spec import CACHE_BITS, FLOAT_BITS

KINDS: dict[type, Callable[[Any], Any]] = {
    DynamicLayer: lambda layer: DynamicLayer(),
    DynamicSlidingWindowLayer: lambda layer: DynamicSlidingWindowLayer(layer.sliding_window),
    StaticLayer: lambda layer: StaticLayer(layer.max_cache_len),
    StaticSlidingWindowLayer: lambda layer: StaticSlidingWindowLayer(layer.max_cache_len, layer.max_cache_len),
}
"""The kinds of layer that can hold codes, each with how an empty one like another is made: all only move tokens."""

_EMPTY_KINDS: tuple[type, ...] = tuple(
    getattr(cache_utils, name) for name in ("DummyLayer",) if hasattr(cache_utils, name)
)
"""Kinds of layer that keep nothing, which newer versions of transformers have."""


class Int8Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values [batch, heads, tokens, head_dim] of one layer as int8, scales [batch, heads, tokens, 1] beside.

    codes, scales: two empty layers of one kind of `KINDS`. Where a token is kept, and which are dropped, is theirs.
    """

    def __init__(self, codes: Any, scales: Any) -> None:
        self.codes, self.scales = codes, scales
        self.is_compileable, self.is_sliding = codes.is_compileable, codes.is_sliding
        self.keys = self.values = None  # for code of transformers that asks whether there are floats

    @property
    def is_initialized(self) -> bool:
        """Whether there are tensors yet."""
        return bool(self.codes.is_initialized)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` leaves no trace of what it takes away."""
        return bool(self.codes.is_croppable)

    @property
    def record_past(self) -> bool:
        """Whether tokens beyond a window are kept until the next `crop`."""
        return bool(getattr(self.codes, "record_past", False))

    @record_past.setter
    def record_past(self, wanted: bool) -> None:
        for layer in (self.codes, self.scales):
            if hasattr(layer, "record_past"):
                layer.record_past = wanted

    @property
    def batch_size(self) -> int:
        """Sequences; an AttributeError, which transformers expects, before there are any or where they are not told."""
        return int(self.codes.batch_size)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the tensors that such keys and values, floats, will be kept in."""
        (keys, key_scale), (values, value_scale) = rounded(key_states), rounded(value_states)
        self.codes.lazy_initialization(keys, values)
        self.scales.lazy_initialization(key_scale, value_scale)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep keys and values of new tokens; return those that attention reads, as floats of the same dtypes."""
        (keys, key_scale), (values, value_scale) = rounded(key_states), rounded(value_states)
        keys, values = self.codes.update(keys, values, *args, **kwargs)
        key_scale, value_scale = self.scales.update(key_scale, value_scale, *args, **kwargs)
        return restored(keys, key_scale, key_states.dtype), restored(values, value_scale, value_states.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of what attention will read."""
        length, offset = self.codes.get_mask_sizes(query_length)
        return length, offset

    def get_seq_length(self) -> Any:
        """Return how many tokens were cached: an int, or a tensor of one."""
        return self.codes.get_seq_length()

    def get_max_length(self) -> int:
        """Return how many tokens fit, -1 for any number."""
        return int(self.codes.get_max_length())

    def activate_past_recording(self) -> None:
        """Keep tokens beyond a window until the next `crop`."""
        self._both("activate_past_recording")

    def offload(self) -> None:
        """Move the tensors to the CPU."""
        self._both("offload")

    def prefetch(self) -> None:
        """Move the tensors back to their device."""
        self._both("prefetch")

    def reset(self) -> None:
        """Forget all tokens."""
        self._both("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences of these indices, for beams."""
        self._both("reorder_cache", beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens away; their number is negative."""
        self._both("crop", tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._both("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices alone."""
        self._both("batch_select_indices", indices)

    def _both(self, name: str, *arguments: Any) -> None:
        for layer in (self.codes, self.scales):
            if hasattr(layer, name):  # layers that keep all tokens have no past to record
                getattr(layer, name)(*arguments)


def int8_cache(cache: Any) -> Any:
    """Return an empty cache of transformers, growing or static, changed in place to keep int8.

    Raises CacheError for a cache that holds tokens already, and for kinds of layer that are no plain keys and values:
    recurrent states, indexers, caches that are quantized in another way.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise CacheError(f"a {type(cache).__name__} cannot be kept in int8: give a DynamicCache or a StaticCache")
    cache.layers = [_int8_layer(layer, place=i) for i, layer in enumerate(layers)]
    if cache.layer_class_to_replicate is not None:
        cache.layer_class_to_replicate = _replicated(cache.layer_class_to_replicate)
    return cache


def _int8_layer(layer: Any, *, place: int) -> Any:
    if isinstance(layer, (Int8Layer, *_EMPTY_KINDS)):
        return layer
    _check_kind(type(layer), f"layer {place} of the cache")
    if layer.is_initialized and int(layer.get_seq_length()) > 0:
        raise CacheError(f"layer {place} of the cache holds tokens already: only an empty cache is turned to int8")
    return _empty(layer)


def _empty(like: Any) -> Int8Layer:
    make = KINDS[type(like)]
    layer = Int8Layer(make(like), make(like))
    if getattr(like, "record_past", False):  # an assistant's, which takes back what was refused
        layer.activate_past_recording()
    return layer


def _empty_of(kind: Any) -> Int8Layer:
    return _empty(kind())


def _replicated(kind: Any) -> Callable[[], Int8Layer]:
    """Return what makes the layers of a cache that makes them when they are first written to."""
    _check_kind(kind, "the cache")
    return partial(_empty_of, kind)  # which is pickled, as a function in here would not be


def _check_kind(kind: type, where: str) -> None:
    if kind not in KINDS:
        raise CacheError(
            f"{where} is a {kind.__name__}, which cannot be kept in int8: use cache.bits = {FLOAT_BITS} here "
            f"(int8 is for {', '.join(known.__name__ for known in KINDS)})"
        )


# ---------------------------------------------------------------- models


def check_cache_bits(model: Any, bits: int) -> None:
    """Raise CacheError where a model's keys and values cannot be kept in so many bits."""
    if bits not in CACHE_BITS:
        raise CacheError(f"a cache of {bits} bits: expected {' or '.join(map(str, CACHE_BITS))}")
    if bits == FLOAT_BITS:
        return
    if not hasattr(model, "_prepare_cache_for_generation"):
        raise CacheError(f"{type(model).__name__} has no generate that makes a cache: its bits cannot be chosen")
    int8_cache(DynamicCache(config=model.config.get_text_config(decoder=True)))


def set_cache_bits(model: nn.Module, bits: int) -> None:
    """Have `model.generate` keep keys and values in 8 bits, or in the model's floats: 16. Not saved with the model.

    Holds for every cache that generate makes, growing or static; a cache that is handed to it stays as it is (make one
    by `int8_cache`), and so do forward calls without one. Raises CacheError as `check_cache_bits` does.
    """
    check_cache_bits(model, bits)
    vars(model).pop(_HOOK, None)
    if bits < FLOAT_BITS:
        vars(model)[_HOOK] = partial(_prepare_in_int8, model)  # unlike a method, it is pickled as what it is


_HOOK = "_prepare_cache_for_generation"
"""The method of transformers that makes the cache of `generate`, the same from 5.17 on."""


def _prepare_in_int8(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> Any:
    """Have the model's class make the cache, and turn it to int8 unless the caller gave it."""
    given = model_kwargs.get("past_key_values")
    found = getattr(type(model), _HOOK)(model, generation_config, model_kwargs, *rest)
    made = model_kwargs.get("past_key_values")
    if made is not None and made is not given:
        int8_cache(made)
    return found

"""An int8 KV cache against one of floats: bytes, perplexity over the cache, and greedy text, eager and compiled."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import StaticCache

import bwla_compiler as bwla
from benchmarks.record import Row
from bwla_compiler.api import int8_cache, set_cache_bits
from bwla_compiler.backend import compile_backend
from bwla_compiler.demo import demo_tokens
from bwla_compiler.runtime.kv_cache import Int8Layer
from bwla_compiler.spec import CACHE_BITS, FLOAT_BITS

Progress = Callable[[str, int, int], None]

RECIPE = "bwla-w1a6"
PROMPT_TOKENS, NEW_TOKENS = 16, 200


def measure(progress: Progress, *, sequences: int = 8, length: int = 256, prompts: int = 6) -> list[Row]:
    """Return a row per model (the embedded one, float and packed) and bits of the cache; floats are float32.

    perplexity: of held-out windows read `chunk` tokens at a time, so that all but the first of them are predicted from
    what the cache holds. same_best: share of positions with the best token of the float cache. equal_tokens: of 200,
    mean over prompts, until greedy text parts from that of the float cache. compiled_equal_tokens: the same for
    compiled and eager text, of the packed model. n_bytes: of the cache of these windows.
    """
    loaded = bwla.load("demo:")
    windows = demo_tokens("test", sequences=sequences, length=length)
    starts = demo_tokens("test", sequences=prompts, length=PROMPT_TOKENS)[:, :PROMPT_TOKENS]
    rows = _rows("float", loaded.model, windows, starts, progress)
    bwla.quantize(loaded.model, recipe=RECIPE, settings={"tuning.steps": 0}, progress=progress)
    rows += _rows(RECIPE, loaded.model, windows, starts, progress)
    eager = _text(loaded.model, starts, bits=8)
    loaded.model.compile(backend=compile_backend, dynamic=False)
    progress("compiled text", 0, 1)
    rows[-1]["compiled_equal_tokens"] = _equal_tokens(_text(loaded.model, starts, bits=8), eager)
    return rows


def _rows(name: str, model: Any, windows: Tensor, starts: Tensor, progress: Progress) -> list[Row]:
    """Return the rows of one model, floats first."""
    found: dict[int, tuple[Row, Tensor, Tensor]] = {}
    for done, bits in enumerate(sorted(CACHE_BITS, reverse=True)):
        progress(f"{name}, cache of {bits} bits", done, len(CACHE_BITS))
        row, best = _teacher_forced(model, windows, bits=bits)
        found[bits] = ({"model": name, "bits": bits, **row}, best, _text(model, starts, bits=bits))
    _, exact, text = found[FLOAT_BITS]
    for row, best, own in found.values():
        row["same_best"] = (best == exact).double().mean().item()
        row["equal_tokens"] = _equal_tokens(own, text)
    return [row for row, _, _ in found.values()]


def _teacher_forced(model: Any, windows: Tensor, *, bits: int, chunk: int = 16) -> tuple[Row, Tensor]:
    """Return perplexity and bytes of the cache, and the best token at every position [sequences, length]."""
    ids, wanted = windows[:, :-1], windows[:, 1:]
    cache: Any = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    if bits < FLOAT_BITS:
        int8_cache(cache)
    with torch.no_grad():
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(chunk, 1)]
    logits = torch.cat(parts, 1)
    nats = cross_entropy(logits.flatten(0, 1), wanted.flatten()).item()
    return {"perplexity": math.exp(nats), "n_bytes": _n_bytes(cache)}, logits.argmax(-1)


def _n_bytes(cache: Any) -> int:
    inner = ((layer.codes, layer.scales) if isinstance(layer, Int8Layer) else (layer,) for layer in cache.layers)
    return sum(tensor.nbytes for layers in inner for one in layers for tensor in (one.keys, one.values))


def _text(model: Any, starts: Tensor, *, bits: int) -> Tensor:
    """Return the greedy continuations [prompts, 200] that generate makes, its cache static."""
    set_cache_bits(model, bits)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        found: Tensor = model.generate(starts, cache_implementation="static", **options)
    return found[:, starts.shape[1] :]


def _equal_tokens(found: Tensor, expected: Tensor) -> float:
    """Return how many tokens come before two texts part, mean over texts."""
    return (found == expected).int().cumprod(1).sum(1).double().mean().item()

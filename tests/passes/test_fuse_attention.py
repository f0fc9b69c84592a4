"""FuseAttention on graphs of models and of small functions: what becomes one call, and what stays and why."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.fx import GraphModule
from transformers import StaticCache

from bwla_compiler.backend import compile_backend, lower
from bwla_compiler.backend.lower import inductor_passes
from bwla_compiler.passes.fuse_attention import FuseAttention
from bwla_compiler.passes.read_codes import ReadCodes
from bwla_compiler.passes.shared_attention import share_attention
from bwla_compiler.runtime.kv_cache import int8_cache
from bwla_compiler.runtime.kv_rounding import restored, rounded
from tests import tiny
from tests.packed import packed
from tests.passes.test_attention import traced
from tests.wider import wider

ATTEND = torch.ops.bwla.attend.default
CACHED = torch.ops.bwla.cached_attention.default


@dataclass
class Step:
    """What a graph does between two linears; each field is a way in which it may be done otherwise."""

    turn_query: Callable[..., Tensor] | None = None
    turn_key: Callable[..., Tensor] | None = None
    write: Callable[..., Tensor] | None = None
    result: Callable[[Tensor], Tensor] | None = None
    after: Callable[..., Any] | None = None
    codes: bool = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        query, key, value, cos, sin, start, keys, values, *scales = inputs
        q = (self.turn_query or turned)(query.transpose(1, 2), cos, sin)
        k = (self.turn_key or turned)(key.transpose(1, 2), cos, sin)
        v, write = value.transpose(1, 2), self.write or written
        if self.codes:
            (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
            new_scales = [write(s, t, start) for s, t in zip(scales, (k_scale, v_scale), strict=True)]
        new = [write(keys, k, start), write(values, v, start)]
        read = [restored(t, s, torch.float32) for t, s in zip(new, new_scales, strict=True)] if self.codes else new
        shown = torch.arange(keys.shape[2]) <= torch.arange(q.shape[2])[:, None] + start
        y = ATTEND(q, *read, shown[None, None], 0.3)
        y = (self.result or by_token)(y)
        for cache, edited in zip((keys, values, *scales), (*new, *(new_scales if self.codes else ())), strict=True):
            cache.copy_(edited)
        more = self.after(*new) if self.after is not None else ()
        return (y, *more)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


def turned_in_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    crossed = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos.unsqueeze(1) + crossed * sin.unsqueeze(1)


def summed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return (x + cos.unsqueeze(1)) + (torch.cat((-second, first), -1) + sin.unsqueeze(1))


def turned_alike(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turned(x, cos[:, :1], sin[:, :1])


def by_token(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def written(cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.index_put(cache, [None, None, torch.arange(rows.shape[2]) + start], rows)
    return found


def inputs_of(*, tokens: int = 1, codes: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    rows = [torch.randn(2, tokens, heads, 16, generator=g) for heads in (4, 2, 2)]
    angles, caches = torch.randn(1, tokens, 16, generator=g), [torch.randn(2, 2, 12, 16, generator=g) for _ in range(2)]
    held = [part for cache in caches for part in rounded(cache)] if codes else caches
    held = [*held[::2], *held[1::2]] if codes else held
    return [*rows, angles.cos(), angles.sin(), torch.tensor(5), *held]


def fused(step: Step, inputs: list[Tensor]) -> tuple[GraphModule, Any]:
    gm = traced(step, *inputs)
    ReadCodes().run(gm.graph)
    report = FuseAttention().run(gm.graph)
    gm.recompile()
    return gm, report


@pytest.mark.parametrize(
    ("step", "tokens"),
    [
        (Step(), 1),
        (Step(), 7),
        (Step(codes=True), 1),
        (Step(turn_query=lambda x, cos, sin: x, turn_key=lambda x, cos, sin: x), 3),
    ],
)
def test_a_step_becomes_one_call_and_computes_the_same(step: Step, tokens: int) -> None:
    inputs = inputs_of(tokens=tokens, codes=step.codes)
    gm, report = fused(step, inputs)
    assert len(report.changed) == 1
    assert report.skipped == []
    called = {node.target for node in gm.graph.nodes if node.op == "call_function"}
    assert CACHED in called
    assert called.isdisjoint({ATTEND, torch.ops.aten.index_put.default, torch.ops.aten.copy_.default})
    expected, found = ([t.clone() for t in inputs] for _ in range(2))
    with torch.no_grad():
        assert torch.equal(gm(*found)[0], step(*expected)[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # the caches among them


def shuffled(cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.index_put(cache, [None, None, torch.arange(rows.shape[2]) * 2 + start], rows)
    return found


def added(cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    places = torch.arange(rows.shape[2]) + start
    found: Tensor = torch.ops.aten.index_put(cache, [None, None, places], rows, True)
    return found


LEFT: dict[str, tuple[Step, str]] = {
    "pairs": (Step(turn_query=turned_in_pairs, turn_key=turned_in_pairs), "not RoPE by halves"),
    "sums": (Step(turn_query=summed, turn_key=summed), "not RoPE by halves"),
    "one angle for all tokens": (Step(turn_query=turned_alike, turn_key=turned_alike), "not RoPE by halves"),
    "one sequence for all": (
        Step(write=lambda cache, rows, start: written(cache, rows[:1], start)), "not written token by token"
    ),
    "a negative angle": (
        Step(turn_query=lambda x, cos, sin: turned(x, cos, sin), turn_key=lambda x, cos, sin: turned(x, sin, cos)),
        "turned differently",
    ),
    "keys as they are": (Step(turn_key=lambda x, cos, sin: x), "turned differently"),
    "every other place": (Step(write=shuffled), "one after the other"),
    "added to what is there": (Step(write=added), "not written token by token"),
    "a cache that is not an input": (
        Step(write=lambda cache, rows, start: written(cache * 1, rows, start)), "read or edited by others"
    ),
    "a cache that grows": (
        Step(write=lambda cache, rows, start: torch.cat([cache, rows], 2)[:, :, rows.shape[2]:]),
        "not written into a static cache",
    ),
    "what is kept is given back": (Step(after=lambda keys, values: (keys,)), "read or edited by others"),
    "heads first": (Step(result=lambda y: y.reshape(2, -1, 64)), "otherwise than by token"),
    "read twice": (Step(result=lambda y: by_token(y) + y.sum()), "otherwise than by token"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_proven_the_same_stays(name: str) -> None:
    step, reason = LEFT[name]
    inputs = inputs_of(tokens=4)
    gm, report = fused(step, inputs)
    assert report.changed == []
    ((_, said),) = report.skipped
    assert reason in said
    expected, found = ([t.clone() for t in inputs] for _ in range(2))
    with torch.no_grad():
        assert torch.equal(gm(*found)[0], step(*expected)[0])


@pytest.mark.parametrize("bits", [8, *wider(16)])
@pytest.mark.parametrize("name", ["qwen3", *wider("llama", "mistral", "gpt2", "phi3")])
def test_all_blocks_of_a_step_are_one_routine(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(name)
    share_attention(model)
    caches: list[Any] = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    if bits == 8:
        caches = [int8_cache(cache) for cache in caches]
    passes = inductor_passes()
    monkeypatch.setattr(lower, "inductor_passes", lambda *_: passes)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=compile_backend, fullgraph=True, dynamic=False)
    ids = tiny.ids()[:1, :8]
    uncached = (inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False))
    with torch.no_grad(), uncached[0], uncached[1]:
        for cache in caches:
            model(ids[:, :5], past_key_values=cache)
        for i in range(5, 8):
            expected, found = (
                run(ids[:, i : i + 1], past_key_values=cache).logits
                for run, cache in zip((model, compiled), caches, strict=True)
            )
            assert torch.equal(found, expected)
    reports = {report.name: report for report in passes["post_grad_custom_pre_pass"].reports}
    assert len(reports["fuse-attention"].changed) == 2
    # gpt2's positions are added to what the transform behind its embedding gives
    assert len(reports["bind-calls"].changed) == (2 if name == "gpt2" else 1)

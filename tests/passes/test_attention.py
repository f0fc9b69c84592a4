"""Packed models attend by bwla::attend, and compiled steps over an int8 cache read its codes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache, StaticCache

from bwla_compiler.passes import shared_attention
from bwla_compiler.passes.read_codes import ReadCodes
from bwla_compiler.passes.shared_attention import OURS, share_attention
from bwla_compiler.runtime.kv_rounding import restored, rounded
from tests import tiny

ATTEND = torch.ops.bwla.attend.default


def logits(model: nn.Module, ids: Tensor, cache: Any = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, past_key_values=cache, use_cache=cache is not None).logits
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "phi3", "mistral"])
def test_a_model_attends_by_ours_and_computes_the_same(name: str) -> None:
    model = tiny.make(name)
    ids = tiny.ids()
    before = logits(model, ids)
    assert share_attention(model)
    assert model.config._attn_implementation == OURS  # type: ignore[union-attr]
    assert not share_attention(model)  # it does already
    # of float32, in another order of sums
    assert torch.allclose(logits(model, ids), before, atol=1e-5)


@pytest.mark.parametrize("make", [lambda c: DynamicCache(config=c), lambda c: StaticCache(c, max_cache_len=12)])
def test_steps_over_a_cache_are_those_of_the_whole_text(make: Callable[[Any], Any]) -> None:
    model = tiny.make("qwen3")
    ids = tiny.ids()[:, :8]
    before = logits(model, ids)
    share_attention(model)
    cache = make(model.config)
    first = logits(model, ids[:, :5], cache)
    rest = [logits(model, ids[:, i : i + 1], cache) for i in range(5, 8)]
    assert torch.allclose(torch.cat([first, *rest], 1), before, atol=1e-5)


def test_padding_is_not_seen() -> None:
    model = tiny.make("llama")
    ids, pads = tiny.ids()[:1, :6], torch.full((1, 3), 1)
    share_attention(model)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        padded = model(torch.cat([pads, ids], 1), attention_mask=mask, position_ids=positions).logits[:, 3:]
        assert torch.allclose(padded, model(ids).logits, atol=1e-5)


def test_a_mask_may_have_one_row_for_all_tokens() -> None:
    model: Any = tiny.make("llama")
    mask = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    mask[..., :3] = False
    ids = tiny.ids(batch=1, length=12)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        assert share_attention(model)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-4)


def test_another_choice_of_attention_stays() -> None:
    model: Any = tiny.make("llama")
    model.set_attn_implementation("eager")
    assert not share_attention(model)
    assert model.config._attn_implementation == "eager"
    assert not share_attention(nn.Linear(3, 3))


def test_a_family_that_asks_for_torchs_attention_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny.make("llama")
    source = 'if self.config._attn_implementation == "sdpa": pass'
    monkeypatch.setattr(shared_attention.inspect, "getsource", lambda home: source)
    assert not share_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("option", [{"dropout": 0.5}, {"position_bias": torch.zeros(1, 1, 1, 9)}])
def test_what_ours_has_no_place_for_goes_to_torch(option: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(shared_attention, "sdpa_attention_forward", lambda *args, **options: asked.append(options))
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8)
    shared_attention.attention(nn.Module(), query, key, key, None, **option)
    assert asked == [option]


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> GraphModule:
    with torch.no_grad():
        table = select_decomp_table()
        found: GraphModule = make_fx(function, decomposition_table=table, tracing_mode="fake")(*inputs)
    return found


def codes(length: int = 9) -> tuple[Tensor, Tensor]:
    return rounded(torch.randn(1, 2, length, 16, generator=torch.Generator().manual_seed(1)))


def step(query: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor) -> Tensor:
    return ATTEND(query, restored(k, k_scale, torch.float32), restored(v, v_scale, torch.float32), None, 0.3)


def test_codes_are_read_with_the_same_bits_and_once_is_enough() -> None:
    inputs = (torch.randn(1, 4, 1, 16), *codes(), *codes())
    gm = traced(step, *inputs)
    report = ReadCodes().run(gm.graph)
    assert len(report.changed) == 1
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)  # no floats are made
    gm.recompile()
    assert torch.equal(gm(*inputs), step(*inputs))
    assert not ReadCodes().run(gm.graph).changed


def test_floats_and_many_tokens_are_left_alone_with_a_reason() -> None:
    key = torch.randn(1, 2, 9, 16)
    gm = traced(lambda q, k: ATTEND(q, k, k, None, 0.3), torch.randn(1, 4, 1, 16), key)
    ((_, reason),) = ReadCodes().run(gm.graph).skipped
    assert "no codes" in reason
    gm = traced(step, torch.randn(1, 4, 3, 16), *codes(), *codes())
    ((_, reason),) = ReadCodes().run(gm.graph).skipped
    assert "more than one token" in reason


def test_an_edit_of_a_cache_in_between_keeps_the_floats() -> None:
    def edited(query: Tensor, k: Tensor, k_scale: Tensor) -> Tensor:
        floats = restored(k, k_scale, torch.float32)
        k.zero_()
        return ATTEND(query, floats, floats, None, 0.3)

    inputs = (torch.randn(1, 4, 1, 16), *codes())
    wanted = edited(*(t.clone() for t in inputs))
    gm = traced(edited, *inputs)
    ((_, reason),) = ReadCodes().run(gm.graph).skipped
    assert "edits a tensor in place" in reason
    assert torch.equal(gm(*inputs), wanted)

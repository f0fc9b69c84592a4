"""bwla::attend: against float64 on odd shapes, whatever holds the cache and hides its keys; and one set of bits."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bwla_compiler.errors import GradientError, ShapeError
from bwla_compiler.runtime import compiled, native, ops
from bwla_compiler.runtime.attention import attend as portable
from bwla_compiler.runtime.kv_rounding import rounded

assert ops.LIBRARY is not None

ATTEND = torch.ops.bwla.attend.default

SHAPES = [(1, 16, 8, 160, 128), (2, 6, 2, 7, 5), (1, 4, 4, 1, 64), (3, 14, 2, 1025, 33), (1, 8, 1, 600, 96)]
"""(batch, heads, kv heads, length, size) of one token: groups of 1, 2, 3, 7, 8; less than a span of keys, and more."""

MANY = [
    (1, 16, 8, 128, 144, 128),
    (2, 6, 2, 7, 7, 5),
    (2, 14, 2, 70, 600, 33),
    (1, 2, 1, 600, 600, 40),
    (1, 3, 3, 2, 9, 8),
]
"""(batch, heads, kv heads, tokens, length, size)."""

TOLERANCE = 2e-6
"""Relative error: float32's summation over a thousand keys."""


@pytest.fixture(params=["native", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Have the kernels serve, or plain torch; nothing of it stays."""
    operators = native.operators()
    if request.param == "native":
        if operators is None or not native.install():
            pytest.skip("no compiler")
        yield "native"
        return
    monkeypatch.setattr(native, "install", lambda: False)
    if operators is not None:
        operators.unregister()
    yield "portable"
    if operators is not None:
        monkeypatch.undo()
        native.install()


def operands(batch: int, heads: int, kv_heads: int, tokens: int, length: int, size: int) -> list[Tensor]:
    """Return queries, keys and values, of which two lie tokens by tokens in memory."""
    g = torch.Generator().manual_seed(length * heads)
    query = torch.randn(batch, tokens, heads, size, generator=g).transpose(1, 2)
    key = torch.randn(batch, kv_heads, length, size, generator=g)
    return [query, key, torch.randn(batch, length, kv_heads, size, generator=g).transpose(1, 2)]


def masks(batch: int, heads: int, tokens: int, length: int) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(length)
    past = torch.arange(length) <= torch.arange(tokens)[:, None] + (length - tokens) // 2
    hidden = torch.zeros(1, 1, tokens, length).masked_fill(~past, -torch.inf)
    by_head = past & (torch.rand(batch, heads, tokens, length, generator=g) < 0.5)
    return {
        "none": None,
        "past": past[None, None],
        "floats": hidden + torch.randn(batch, 1, tokens, length, generator=g),
        "by head": by_head,
        "few": torch.rand(batch, 1, tokens, length, generator=g) < 0.02,  # of some tokens, none
    }


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    added = mask if mask is None or mask.dtype == torch.bool else mask.double()
    operands = (t.double() for t in (query, key, value))
    return scaled_dot_product_attention(*operands, attn_mask=added, scale=scale, is_causal=causal, enable_gqa=True)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("mask", masks(1, 1, 1, 1))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_token_equals_reference(path: str, shape: tuple[int, ...], mask: str) -> None:
    batch, heads, kv_heads, length, size = shape
    query, key, value = operands(batch, heads, kv_heads, 1, length, size)
    hidden = masks(batch, heads, 1, length)[mask]
    found = ATTEND(query, key, value, hidden, 0.3)
    assert found.shape == query.shape
    assert error(found, exact(query, key, value, hidden, 0.3)) < TOLERANCE


@pytest.mark.parametrize("mask", masks(1, 1, 1, 1))
@pytest.mark.parametrize("shape", MANY, ids=str)
def test_many_tokens_equal_reference(path: str, shape: tuple[int, ...], mask: str) -> None:
    batch, heads, _, tokens, length, size = shape
    query, key, value = operands(*shape)
    hidden = masks(batch, heads, tokens, length)[mask]
    found = ATTEND(query, key, value, hidden, size**-0.5)
    assert error(found, exact(query, key, value, hidden, size**-0.5)) < TOLERANCE


@pytest.mark.parametrize("shape", MANY, ids=str)
def test_causal_equals_reference(path: str, shape: tuple[int, ...]) -> None:
    query, key, value = operands(*shape)
    found = ATTEND(query, key, value, None, 0.2, True)
    assert error(found, exact(query, key, value, None, 0.2, causal=True)) < TOLERANCE


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 300), st.integers(1, 70)
)
@settings(max_examples=30, deadline=None)
def test_any_shape(batch: int, kv_heads: int, group: int, tokens: int, length: int, size: int) -> None:
    query, key, value = operands(batch, kv_heads * group, kv_heads, tokens, length, size)
    mask = masks(batch, kv_heads * group, tokens, length)["by head"]
    found = ATTEND(query, key, value, mask, 0.3)
    assert error(found, exact(query, key, value, mask, 0.3)) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_bfloat16_have_the_bits_of_their_floats(shape: tuple[int, ...]) -> None:
    batch, heads, kv_heads, length, size = shape
    query, key, value = operands(batch, heads, kv_heads, 1, length, size)
    mask = masks(batch, heads, 1, length)["past"]
    (codes, scale), (value_codes, value_scale) = rounded(key), rounded(value)
    floats = ATTEND(query, codes * scale, value_codes * value_scale, mask, 0.3)
    assert torch.equal(ATTEND(query, codes, value_codes, mask, 0.3, False, scale, value_scale), floats)
    halves = (key.bfloat16(), value.bfloat16())
    assert torch.equal(ATTEND(query, *halves, mask, 0.3), ATTEND(query, *(t.float() for t in halves), mask, 0.3))


@pytest.mark.parametrize("tokens", [1, 5, 128, 300])
def test_hidden_keys_do_not_change_a_bit(tokens: int) -> None:
    query, key, value = operands(2, 6, 2, tokens, tokens + 150, 24)
    mask = torch.arange(key.shape[2]) <= torch.arange(tokens)[:, None]
    longer = ATTEND(query, key, value, mask[None, None], 0.3)
    shorter = ATTEND(query, key[:, :, :tokens], value[:, :, :tokens], mask[None, None, :, :tokens], 0.3)
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, None]
    assert torch.equal(ATTEND(query, key, value, added, 0.3), longer)
    if compiled.kernels() is not None:  # else it is torch's kernel, which adds hidden keys up with the others
        assert torch.equal(longer, shorter)
        causal = ATTEND(query, key[:, :, :tokens], value[:, :, :tokens], None, 0.3, tokens > 1)
        assert torch.equal(longer, causal)


@pytest.mark.parametrize("tokens", [1, 40])
def test_threads_do_not_change_a_bit(tokens: int) -> None:
    query, key, value = operands(2, 6, 2, tokens, 700, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ATTEND(query, key, value, None, 0.3)
        torch.set_num_threads(2)
        assert torch.equal(ATTEND(query, key, value, None, 0.3), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 9])
def test_what_is_no_number_stays_in_its_row(path: str, tokens: int) -> None:
    query, key, value = operands(1, 4, 2, tokens, 50, 16)
    query[0, 1, 0, 3] = torch.nan
    found = ATTEND(query, key, value, None, 0.3)
    sick = found.isnan().any(-1)
    assert sick[0, 1, 0]
    assert int(sick.sum()) == 1


@pytest.mark.parametrize("length", [1, 11, 17, 33])
def test_what_an_earlier_call_left_is_not_read(length: int) -> None:
    sick = [torch.full_like(t, torch.nan) for t in operands(1, 4, 2, 300, 300, 64)]
    healthy = [t[..., :24].contiguous() for t in operands(1, 4, 2, length, length, 64)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # so that both use the same memory
        ATTEND(*sick, None, 0.3, True)
        found = ATTEND(*healthy, None, 0.3, length > 1)
    finally:
        torch.set_num_threads(before)
    assert error(found, exact(*healthy, None, 0.3, causal=length > 1)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_the_query(path: str, dtype: torch.dtype) -> None:
    query, key, value = (t.to(dtype) for t in operands(1, 4, 2, 1, 30, 16))
    found = ATTEND(query, key, value, None, 0.3)
    assert found.dtype == dtype
    assert error(found.double(), exact(query, key, value, None, 0.3)) < 1e-2  # one rounding to 8 bits


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"query": (1, 4, 16)}, "query"),
        ({"key": (1, 3, 30, 16)}, "key"),
        ({"value": (1, 2, 31, 16)}, "value"),
        ({"mask": (1, 1, 1, 29)}, "mask"),
        ({"key_scale": (1, 2, 29, 1)}, "key_scale"),
    ],
)
def test_wrong_shapes_are_named(path: str, change: dict[str, tuple[int, ...]], named: str) -> None:
    shapes: dict[str, Any] = {"query": (1, 4, 1, 16), "key": (1, 2, 30, 16), "value": (1, 2, 30, 16)} | change
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    rest = (given.get("mask"), 0.3, False, given.get("key_scale"), None)
    with pytest.raises(ShapeError, match=named):
        ATTEND(given["query"], given["key"], given["value"], *rest)


def test_a_mask_and_causality_at_once_are_refused(path: str) -> None:
    query, key, value = operands(1, 4, 2, 3, 3, 16)
    with pytest.raises(ShapeError, match="causal"):
        ATTEND(query, key, value, torch.ones(1, 1, 3, 3, dtype=torch.bool), 0.3, True)


def test_opcheck_and_gradients() -> None:
    query, key, value = operands(1, 4, 2, 3, 9, 16)
    torch.library.opcheck(ATTEND, (query, key, value, None, 0.3), test_utils=("test_schema", "test_faketensor"))
    fake = portable(query, key, value, None, 0.3)
    assert fake.stride() == ATTEND(query, key, value, None, 0.3).stride()
    asking = query.clone().requires_grad_()
    with nullcontext(ATTEND(asking, key, value, None, 0.3)) as y, pytest.raises(GradientError):
        y.sum().backward()

"""The kernels of attention and of writing to a cache, of every instruction set, against float64 on odd shapes."""

import ctypes

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bwla_compiler.codegen.isa import ISAS
from bwla_compiler.runtime.kv_rounding import rounded
from tests.codegen.emulated import Attention, Cached, Rows, kernels
from tests.codegen.test_kernels import Library

SHAPES = [(1, 4, 2, 1, 5), (2, 2, 1, 300, 24), (1, 3, 7, 257, 33)]
"""(batch, kv heads, group, length, size): no vector, tile of keys or span divides them all."""

KINDS = {"float32": 4, "bfloat16": 2, "int8": 1}


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> Library:
    return kernels(request.param)


def cached(held: Tensor, scale: Tensor | None) -> Cached:
    _, heads, length, size = held.shape
    strides = (heads * length * size, length * size, size)
    address = None if scale is None else scale.data_ptr()
    return Cached(held.data_ptr(), *strides, address, heads * length, length, 1)


def attended(
    library: Library, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool = False,
    scales: tuple[Tensor, Tensor] | None = None, turns: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return what the kernel makes of contiguous query [batch, heads, tokens, size], mask for all heads."""
    batch, heads, tokens, size = query.shape
    kv_heads, length = key.shape[1:3]
    y = torch.full((batch, tokens, heads, size), torch.nan)
    key_scale, value_scale = scales or (None, None)
    a = Attention(
        query.data_ptr(), None if mask is None else mask.data_ptr(), y.data_ptr(), cached(key, key_scale),
        cached(value, value_scale), heads * tokens * size, tokens * size, size, tokens * length, 0, length,
        0 if mask is None else mask.element_size(), batch, kv_heads, heads // kv_heads, tokens, length, size,
        key.element_size(), 0.3, causal,
    )  # fmt: skip
    if turns:
        a.cos, a.sin, a.turn_token = turns[0].data_ptr(), turns[1].data_ptr(), size
        a.turn_batch = 0 if len(turns[0]) == 1 else tokens * size
    library.attend(ctypes.byref(a), 2)
    return y.transpose(1, 2)


def operands(shape: tuple[int, ...], tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return query, key, value and a mask of which some tokens see nothing."""
    batch, heads, group, length, size = shape
    g = torch.Generator().manual_seed(length)
    query = torch.randn(batch, heads * group, tokens, size, generator=g)
    key, value = (torch.randn(batch, heads, length, size, generator=g) for _ in range(2))
    mask = torch.rand(batch, 1, tokens, length, generator=g) < 0.5
    mask[-1, :, tokens // 2 + 1 :] = False
    return query, key, value, mask


def check(
    found: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool = False
) -> None:
    added = mask if mask is None or mask.dtype == torch.bool else mask.double()
    wanted = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=added, is_causal=causal, scale=0.3, enable_gqa=True
    )
    assert (found - wanted).norm() <= 2e-6 * wanted.norm()  # float32's summation


@pytest.mark.parametrize("hidden", ["nothing", "bytes", "floats"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_token(library: Library, shape: tuple[int, ...], kind: str, hidden: str) -> None:
    query, key, value, mask = operands(shape, 1)
    given = {"nothing": None, "bytes": mask, "floats": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)}[hidden]
    scales, held = None, (key, value)
    if kind == "bfloat16":
        held = (key.bfloat16(), value.bfloat16())
        key, value = (t.float() for t in held)
    if kind == "int8":
        (codes, scale), (value_codes, value_scale) = rounded(key), rounded(value)
        held, scales = (codes, value_codes), (scale, value_scale)
        key, value = codes * scale, value_codes * value_scale
    check(attended(library, query, *held, given, scales=scales), query, key, value, given)


@pytest.mark.parametrize("hidden", ["nothing", "bytes", "floats", "causal"])
@pytest.mark.parametrize(("tokens", "size"), [(2, 17), (5, 24), (40, 24), (600, 24), (600, 48)])
def test_many_tokens(library: Library, tokens: int, size: int, hidden: str) -> None:
    query, key, value, mask = operands((2, 2, 3, 600, size), tokens)
    floats = torch.randn(mask.shape).masked_fill(~mask, -torch.inf)
    given = {"bytes": mask, "floats": floats}.get(hidden)
    causal = hidden == "causal"
    check(attended(library, query, key, value, given, causal=causal), query, key, value, given, causal=causal)


@pytest.mark.parametrize("hidden", ["bytes", "causal"])
@pytest.mark.parametrize("later", [1e6, torch.nan])
def test_later_keys_do_not_change_a_bit(library: Library, hidden: str, later: float) -> None:
    query, key, value, _ = operands((1, 2, 3, 90, 40), 90)
    mask = torch.ones(1, 1, 90, 90, dtype=torch.bool).tril() if hidden == "bytes" else None
    before = attended(library, query, key, value, mask, causal=mask is None)
    key[:, :, 70:], value[:, :, 70:] = later, later
    after = attended(library, query, key, value, mask, causal=mask is None)
    assert torch.equal(after[:, :, :70], before[:, :, :70])


@pytest.mark.parametrize("batch", [1, 2])
def test_queries_are_turned_on_the_way(library: Library, batch: int) -> None:
    query, key, value, mask = operands((2, 2, 3, 80, 40), 75)
    angles = torch.randn(batch, 75, 40, generator=torch.Generator().manual_seed(9))
    cos, sin = angles.cos(), angles.sin()
    first, second = query.chunk(2, -1)
    turned = query * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    expected = attended(library, turned, key, value, mask)
    assert torch.equal(attended(library, query, key, value, mask, turns=(cos, sin)), expected)


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("shape", [(1, 3, 2, 6), (2, 1, 5, 34), (2, 70, 8, 128), (1, 1, 1, 2)], ids=str)
def test_rows_are_turned_and_placed(library: Library, shape: tuple[int, ...], turned: bool, kind: str) -> None:
    batch, tokens, heads, size = shape
    g = torch.Generator().manual_seed(size)
    x = torch.randn(shape, generator=g)
    angles = torch.randn(batch, tokens, size, generator=g)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    crossed = torch.cat([-second, first], -1)
    wanted = (x * cos[:, :, None] + crossed * sin[:, :, None] if turned else x).transpose(1, 2)
    y = torch.full((batch, heads, tokens, size), 99.0 if kind == "float32" else 99)
    y = y if kind == "float32" else y.to(torch.int8)
    scale = torch.full((batch, heads, tokens), torch.nan)
    rows = Rows(
        x.data_ptr(), cos.data_ptr() if turned else None, sin.data_ptr() if turned else None, y.data_ptr(),
        scale.data_ptr() if kind == "int8" else None, tokens * heads * size, heads * size, size,
        heads * tokens * size, tokens * size, size, heads * tokens, tokens, 1, tokens * size, size,
        batch, tokens, heads, size,
    )  # fmt: skip
    library.place(ctypes.byref(rows), 2)
    if kind == "float32":
        assert torch.equal(y, wanted)
        return
    codes, steps = rounded(wanted)
    assert torch.equal(y, codes)
    assert torch.equal(scale[..., None], steps)

"""bwla::cached_attention: against float64 on odd shapes; the bits of RoPE, a cache and attention one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bwla_compiler.errors import GradientError, ShapeError
from bwla_compiler.runtime import native, ops
from bwla_compiler.runtime.kv_rounding import rounded
from tests.runtime.test_attention import TOLERANCE, error, exact, path

__all__ = ["path"]  # the fixture

assert ops.LIBRARY is not None

CACHED = torch.ops.bwla.cached_attention.default

SHAPES = [
    (1, 16, 8, 1, 160, 128),
    (2, 6, 2, 1, 7, 6),
    (1, 4, 4, 5, 9, 64),
    (3, 7, 1, 40, 300, 34),
    (2, 4, 2, 130, 140, 8),
]
"""(batch, heads, kv heads, tokens, length, size)."""


@pytest.fixture(autouse=True)
def served() -> None:
    native.install()


class Case:
    """Operands of one call, in memory as linears leave them: heads beside each other, and other channels beside."""

    def __init__(self, shape: tuple[int, ...], *, start: int = 0, turned: bool = True, codes: bool = False) -> None:
        batch, heads, kv_heads, tokens, length, size = shape
        g = torch.Generator().manual_seed(length * heads + tokens)
        wide = torch.randn(batch, tokens, (heads + 2 * kv_heads) * size, generator=g)
        parts = wide.split([heads * size, kv_heads * size, kv_heads * size], -1)
        self.rows = [part.unflatten(-1, (-1, size)) for part in parts]
        angles = torch.randn(1, tokens, size, generator=g)
        self.turn = (angles.cos(), angles.sin()) if turned else (None, None)
        self.keys, self.values = (torch.randn(batch, kv_heads, length, size, generator=g) for _ in range(2))
        self.start, self.scales = torch.tensor(start), [None, None, None]
        if codes:
            (self.keys, key_scale), (self.values, value_scale) = rounded(self.keys), rounded(self.values)
            self.scales = [key_scale, value_scale, torch.tensor(start)]
        shown = torch.arange(length) <= torch.arange(tokens)[:, None] + start
        self.mask = shown[None, None]

    def caches(self) -> list[Tensor]:
        """Return what a call edits."""
        return [t for t in (self.keys, self.values, *self.scales[:2]) if t is not None]

    def run(self) -> Tensor:
        """Return the result; the caches are edited."""
        rest = (self.start, self.mask, 0.3, *self.scales)
        y: Tensor = CACHED(*self.rows, *self.turn, self.keys, self.values, *rest)
        return y

    def turned(self, x: Tensor) -> Tensor:
        """Return x [batch, heads, tokens, size] as transformers turns it, in its dtype."""
        cos, sin = (None if t is None else t[:, None].to(x.dtype) for t in self.turn)
        if cos is None or sin is None:
            return x
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return result, keys and values in float64, of floats that are not rounded."""
        query, key, value = (t.double().transpose(1, 2) for t in self.rows)
        keys, values = self.keys.double(), self.values.double()
        end = int(self.start) + query.shape[2]
        keys[:, :, int(self.start) : end], values[:, :, int(self.start) : end] = self.turned(key), value
        return exact(self.turned(query), keys, values, self.mask, 0.3).transpose(1, 2).flatten(2), keys, values


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(path: str, shape: tuple[int, ...], turned: bool) -> None:
    case = Case(shape, start=min(2, shape[4] - shape[3]), turned=turned)
    wanted, keys, values = case.expected()
    assert error(case.run(), wanted) < TOLERANCE
    assert error(case.keys, keys) < 1e-7
    assert torch.equal(case.values.double(), values)


@pytest.mark.parametrize(
    ("shape", "codes"), [*((shape, False) for shape in SHAPES), *((shape, True) for shape in SHAPES if shape[3] == 1)]
)
def test_has_the_bits_of_its_parts(path: str, shape: tuple[int, ...], codes: bool) -> None:
    """The parts as transformers and torch compute them: what eager steps do."""
    first = shape[4] - shape[3]
    case, parts = (Case(shape, start=first, codes=codes) for _ in range(2))
    query, key, value = (t.transpose(1, 2) for t in parts.rows)
    new = (parts.turned(key), value)
    for cache, scale, rows in zip((parts.keys, parts.values), parts.scales[:2], new, strict=True):
        cache[:, :, first:] = rounded(rows)[0] if codes else rows
        if scale is not None:
            scale[:, :, first:] = rounded(rows)[1]
    floats = [t if s is None else t * s for t, s in zip((parts.keys, parts.values), parts.scales[:2], strict=True)]
    wanted = torch.ops.bwla.attend(parts.turned(query), *floats, parts.mask, 0.3)
    assert torch.equal(case.run(), wanted.transpose(1, 2).flatten(2))
    assert all(torch.equal(a, b) for a, b in zip(case.caches(), parts.caches(), strict=True))


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 30), st.integers(0, 90), st.integers(1, 40)
)
@settings(max_examples=25, deadline=None)
def test_any_shape(batch: int, kv_heads: int, group: int, tokens: int, more: int, half: int) -> None:
    case = Case((batch, kv_heads * group, kv_heads, tokens, tokens + more, 2 * half), start=more // 2)
    wanted, keys, _ = case.expected()
    assert error(case.run(), wanted) < TOLERANCE
    assert error(case.keys, keys) < 1e-7


@pytest.mark.parametrize("rows", ["zero", "tiny", "subnormal", "not a number", "infinite", "ties"])
def test_rows_at_the_edges_are_rounded_as_the_cache_rounds_them(path: str, rows: str) -> None:
    case = Case((1, 4, 2, 1, 9, 32), turned=False, codes=True)
    value = {"zero": 0.0, "tiny": 1e-36, "subnormal": 1e-40, "not a number": torch.nan, "infinite": torch.inf}
    key = case.rows[1]
    if rows == "ties":
        key[...] = torch.arange(32) + 0.5
        key[..., -1] = 127
    else:
        key[..., 1:] = value[rows]
        key[..., 0] = 0 if rows != "infinite" else 1
    codes, scale = rounded(key.transpose(1, 2))
    case.run()
    kept = case.keys[:, :, :1].float() * case.scales[0][:, :, :1]  # type: ignore[index]
    wanted = codes.float() * scale
    assert torch.equal(kept.isfinite().all(-1), wanted.isfinite().all(-1))
    if bool(wanted.isfinite().all()):
        assert torch.equal(case.keys[:, :, :1], codes)
        assert torch.equal(case.scales[0][:, :, :1], scale)  # type: ignore[index]


@pytest.mark.parametrize("first", [-1, 6, 1000])
def test_tokens_that_do_not_fit_are_refused_and_nothing_is_written(path: str, first: int) -> None:
    case = Case((1, 4, 2, 4, 9, 8), start=first)
    before = [t.clone() for t in case.caches()]
    with pytest.raises(ShapeError, match=r"do not fit a cache of 9: make it longer \(max_cache_len\)"):
        case.run()
    assert all(torch.equal(a, b) for a, b in zip(case.caches(), before, strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": [torch.ones(1, 4, 8)] * 3}, "query"),
        ({"turn": (torch.ones(1, 4, 8), None)}, "RoPE takes both"),
        ({"turn": (torch.ones(1, 3, 8), torch.ones(1, 3, 8))}, "cos"),
        ({"keys": torch.ones(1, 3, 9, 8)}, "a cache"),
        ({"values": torch.ones(1, 2, 9, 8).int()}, "a cache"),
        ({"scales": [torch.ones(1, 2, 9, 1), torch.ones(1, 2, 9, 1), None]}, "scale_start"),
    ],
)
def test_wrong_operands_are_named(path: str, change: dict[str, object], named: str) -> None:
    case = Case((1, 4, 2, 4, 9, 8))
    vars(case).update(change)
    with pytest.raises(ShapeError, match=named):
        case.run()


def test_the_edit_is_seen() -> None:
    case = Case((1, 4, 2, 1, 9, 8), codes=True)
    before = [t._version for t in case.caches()]
    case.run()
    assert all(t._version > v for t, v in zip(case.caches(), before, strict=True))
    with torch.inference_mode():
        Case((1, 4, 2, 1, 9, 8)).run()


def test_opcheck_and_gradients() -> None:
    case = Case((1, 4, 2, 3, 9, 8))
    operands = (*case.rows, *case.turn, case.keys, case.values, case.start, case.mask, 0.3)
    torch.library.opcheck(CACHED, operands, test_utils=("test_schema", "test_faketensor"))
    case.rows[0] = case.rows[0].clone().requires_grad_()
    y = case.run()
    with pytest.raises(GradientError):
        y.sum().backward()

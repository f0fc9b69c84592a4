"""The operators against their float64 references; shapes, gradients, compilation, staleness, no compiler."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bwla_compiler.codegen import library as libraries
from bwla_compiler.errors import GradientError, ShapeError
from bwla_compiler.numerics.kronecker import signed_hadamard
from bwla_compiler.numerics.planes import pack_signs
from bwla_compiler.runtime import compiled, native, ops, reference

BWLA = torch.ops.bwla
assert ops.LIBRARY is not None


def make_linear(out: int, columns: int, *, planes: int = 1, groups: int = 1, rank: int = 0, seed: int = 0) -> Any:
    """Return (signs, scale, low rank or None, bias)."""
    generator = torch.Generator().manual_seed(seed)
    signs = pack_signs(torch.randint(0, 2, (planes, out, columns), generator=generator, dtype=torch.int8) * 2 - 1)
    scale = torch.rand(planes, out, groups, generator=generator) + 0.5
    low_rank = None
    if rank:
        into = torch.randint(-127, 128, (rank, columns), generator=generator, dtype=torch.int8)
        onto = torch.randint(-127, 128, (out, rank), generator=generator, dtype=torch.int8)
        low_rank = (into, onto, torch.rand(rank, generator=generator) / 127**2)
    return signs, scale, low_rank, torch.randn(out, generator=generator)


def run(x: Tensor, linear: Any, bits: int, column_scale: Tensor | None = None) -> Tensor:
    signs, scale, low_rank, bias = linear
    result: Tensor = BWLA.linear(x, signs, scale, column_scale, *(low_rank or (None,) * 3), bias, bits)
    return result


def run_group(x: Tensor, members: list[Any], bits: int) -> list[Tensor]:
    pairs = [low_rank or (None,) * 3 for _, _, low_rank, _ in members]
    columns = [list(c) for c in zip(*pairs, strict=True)]
    results: list[Tensor] = BWLA.linear_group(
        x, [m[0] for m in members], [m[1] for m in members], None, *columns, [m[3] for m in members], bits,
        [None] * len(members), None, [None] * len(members),
    )  # fmt: skip
    return results


@contextmanager
def without_native() -> Iterator[None]:
    """Let the Python implementations serve."""
    installed = native.operators()
    assert installed is not None, "the tests need a C++ compiler and torch's headers"
    installed.unregister()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "install", lambda: False)
        yield
    installed.register()


@pytest.fixture(params=["native", "ctypes", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every implementation: C++ operators, Python over ctypes, plain torch."""
    if request.param == "native":
        native.install()
        yield "native"
        return
    with without_native():
        if request.param == "portable":
            monkeypatch.setattr(compiled, "kernels", lambda: None)
        yield str(request.param)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (libraries.load, compiled.kernels, native.operators)
    with forgetting_native():
        monkeypatch.setenv("BWLA_CXX", "")
        for cache in caches:
            cache.cache_clear()
        yield
        for cache in caches:
            cache.cache_clear()


@contextmanager
def forgetting_native() -> Iterator[None]:
    """Take the C++ operators back, to be found anew."""
    installed = native.operators()
    assert installed is not None
    installed.unregister()
    native.operators.cache_clear()
    yield
    native.operators.cache_clear()


CASES = {
    "plain": {},
    "planes": {"planes": 2},
    "groups": {"groups": 2},
    "low rank": {"rank": 5},
    "all": {"planes": 2, "groups": 2, "rank": 3},
}


@pytest.mark.parametrize("bits", [4, 6, 8, 16])
@pytest.mark.parametrize("case", CASES)
def test_linear_equals_reference(path: str, case: str, bits: int) -> None:
    signs, scale, low_rank, bias = linear = make_linear(70, 200, **CASES[case])
    x = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(1))
    column_scale = torch.rand(200, generator=torch.Generator().manual_seed(2)) + 0.5
    want = reference.linear(x, signs, scale, column_scale, low_rank, bias, bits)
    # 200 float32 additions; the outputs are of the order of ten
    torch.testing.assert_close(run(x, linear, bits, column_scale).double(), want, rtol=1e-5, atol=5e-4)


@given(st.integers(1, 90), st.integers(1, 300), st.integers(0, 6), st.sampled_from([2, 3, 5, 7, 16]))
@settings(deadline=None, max_examples=30)
def test_linear_on_any_shape(out: int, columns: int, tokens: int, bits: int) -> None:
    linear = make_linear(out, columns, seed=out)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns))
    want = reference.linear(x, linear[0], linear[1], None, None, linear[3], bits)
    torch.testing.assert_close(run(x, linear, bits).double(), want, rtol=1e-5, atol=5e-4)  # as above


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40), (2, 1, 3, 40)], ids=str)
def test_dtypes_and_leading_dimensions(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    linear = make_linear(9, 40)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = run(x, linear, 6)
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], 9)
    want = reference.linear(x, linear[0], linear[1], None, None, linear[3], 6)
    torch.testing.assert_close(y, want.to(dtype), rtol=2**-7, atol=2e-4)  # one rounding of bfloat16 apart


def test_strided_input(path: str) -> None:
    linear = make_linear(9, 40)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(run(x, linear, 6), run(x.contiguous(), linear, 6))


def test_group_equals_members_bit_for_bit(path: str) -> None:
    members = [make_linear(30, 200), make_linear(150, 200, planes=2, groups=2), make_linear(5, 200, rank=4)]
    x = torch.randn(2, 5, 200, generator=torch.Generator().manual_seed(1))
    for y, member in zip(run_group(x, members, 6), members, strict=True):
        assert torch.equal(y, run(x, member, 6))


def test_transform_equals_reference(path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(2, 3, 24, generator=generator), torch.rand(24, generator=generator)
    left, right = torch.randn(4, 4, generator=generator), torch.randn(6, 6, generator=generator)
    for factors in ((scale, left, right), (None, left, right), (scale, None, None), (None, None, right)):
        y = BWLA.transform(x, *factors)
        # two float32 sums of at most 6 terms
        torch.testing.assert_close(y.double(), reference.transform(x, *factors), rtol=1e-5, atol=1e-5)
    v = torch.tensor([0.5, -0.5, 0.5, -0.5, -0.5, 0.5, 0.5, 0.5])
    for scaling, other in ((scale, torch.randn(3, 3, generator=generator)), (None, None)):
        y = BWLA.transform(x, scaling, other, v)
        exact = reference.transform(x, scaling, other, signed_hadamard(v.double()))
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(ShapeError):
        BWLA.transform(x, None, torch.eye(4), torch.ones(6))  # six is no power of two
    same = BWLA.transform(x, None, None, None)
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()
    assert BWLA.transform(x.bfloat16(), scale, left, right).dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_int8_linear_equals_reference(path: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (37, 50), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(37, generator=generator) / 127, torch.randn(37, generator=generator)
    x = torch.randn(tokens, 50, generator=generator)
    want = reference.int8_linear(x, codes, scale, bias)
    # float32 sums of 50 terms of order one, of which some processors round the inputs to 16 bits, 2^-15 of three each
    torch.testing.assert_close(BWLA.int8_linear(x, codes, scale, bias).double(), want, rtol=1e-5, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_embedding_equals_reference(path: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (37, 50), generator=generator, dtype=torch.int8)
    scale, ids = torch.rand(37, generator=generator), torch.randint(0, 37, (2, 3), generator=generator)
    # 8 bits times 24 bits rounds once in float32, then once more to bfloat16
    want = reference.int8_embedding(ids, codes, scale, dtype)
    torch.testing.assert_close(BWLA.int8_embedding(ids, codes, scale, dtype), want, rtol=2**-8, atol=0)


def make_nibbles(out: int, columns: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes, float16 bits of scales, their exponent)."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (out, -(-columns // 2)), generator=generator, dtype=torch.uint8)
    scale = torch.randn(out, -(-columns // group), generator=generator).half()
    return codes, scale.view(torch.int16), torch.tensor(-2, dtype=torch.int8)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_linear_equals_reference(path: str, tokens: int, dtype: torch.dtype) -> None:
    codes, bits, exponent = make_nibbles(37, 75, 32)
    scale, bias = bits.view(torch.half).float() / 4, torch.randn(37, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, tokens, 75, generator=torch.Generator().manual_seed(2)).to(dtype)[0]
    want = reference.int4_linear(x, codes, scale, bias, 32)
    got = BWLA.int4_linear(x, codes, bits, bias, 32, exponent)
    # float32 sums of 75 terms of order one; then bfloat16
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(BWLA.int4_linear(x, codes, scale, bias, 32), got, rtol=tolerance, atol=1e-5)
    # what was left of the input: half a step of its largest, a little where a token is all one sign
    exact = x.double() @ reference.int4_weight(codes, scale, 75, 32).T + bias.double()
    assert float((want - exact).norm() / exact.norm()) < 1e-4


def test_a_sick_token_makes_nan_of_its_own_int4_results(path: str) -> None:
    codes, bits, exponent = make_nibbles(5, 40, 64)
    for bad in (float("nan"), float("inf")):
        x = torch.ones(40, 40)  # more than the kernels take, too
        x[1, 3] = bad
        for rows in (x[:2], x):
            y = BWLA.int4_linear(rows, codes, bits, None, 64, exponent)
            assert y[1].isnan().all()
            assert y[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_embedding_equals_reference(path: str, dtype: torch.dtype) -> None:
    codes, bits, exponent = make_nibbles(37, 75, 64)
    ids = torch.randint(0, 37, (2, 3), generator=torch.Generator().manual_seed(0))
    want = reference.int4_weight(codes[ids], (bits.view(torch.half).float() / 4)[ids], 75, 64).to(dtype)
    # 4 bits times 11: exact in float32
    assert torch.equal(BWLA.int4_embedding(ids, codes, bits, 75, 64, dtype, exponent), want)


def test_int4_tables_that_do_not_fit_are_refused(path: str) -> None:
    codes, bits, exponent = make_nibbles(5, 40, 32)
    x = torch.ones(1, 40)
    with pytest.raises(ShapeError, match="group_size is 48: expected one of 32, 64, 128"):
        BWLA.int4_linear(x, codes, bits, None, 48, exponent)
    with pytest.raises(ShapeError, match=r"codes .*expected uint8"):
        BWLA.int4_linear(torch.ones(1, 42), codes, bits, None, 32, exponent)
    with pytest.raises(ShapeError, match=r"scale .*expected \[5, 1\]"):
        BWLA.int4_linear(x, codes, bits, None, 64, exponent)
    with pytest.raises(ShapeError, match=r"scale .*expected \[5, 1\]"):
        BWLA.int4_embedding(torch.tensor([1]), codes, bits, 40, 64, torch.float32, exponent)


def test_opcheck() -> None:
    signs, scale, low_rank, bias = make_linear(9, 40, rank=2)
    x, codes = torch.randn(2, 40), torch.zeros(5, 40, dtype=torch.int8)
    nothing = [None] * 2
    group = (x, [signs] * 2, [scale] * 2, None, nothing, nothing, nothing, [bias, None], 6, nothing, None, nothing)
    ids, (nibbles, bits, exponent) = torch.tensor([1, 2]), make_nibbles(5, 40, 32)
    for operator, arguments in (
        (BWLA.linear, (x, signs, scale, None, *low_rank, bias, 6)),
        (BWLA.linear_group, group),
        (BWLA.transform, (x, None, torch.eye(5), torch.eye(8))),
        (BWLA.int8_linear, (x, codes, torch.ones(5), None)),
        (BWLA.int8_embedding, (ids, codes, torch.ones(5), torch.bfloat16)),
        (BWLA.int4_linear, (x, nibbles, bits, None, 32, exponent)),
        (BWLA.int4_embedding, (ids, nibbles, bits, 40, 32, torch.bfloat16, exponent)),
    ):
        found = torch.library.opcheck(operator.default, arguments)
        assert set(found.values()) == {"SUCCESS"}, operator


def test_meta_shapes() -> None:
    signs, scale, _, _ = (None if t is None else t.to("meta") for t in make_linear(9, 40))
    y = BWLA.linear(torch.empty(2, 3, 40, device="meta"), signs, scale, None, None, None, None, None, 6)
    assert y.is_meta
    assert y.shape == (2, 3, 9)


@pytest.mark.parametrize("op", ["linear", "group", "transform", "int8", "int4"])
def test_gradient_is_refused_only_when_asked(path: str, op: str) -> None:
    linear = make_linear(9, 40)
    x = torch.randn(2, 40, requires_grad=True)
    call = {
        "linear": lambda: run(x, linear, 6),
        "group": lambda: run_group(x, [linear, linear], 6)[1],
        "transform": lambda: BWLA.transform(x, None, torch.eye(5), torch.eye(8)),
        "int8": lambda: BWLA.int8_linear(x, torch.ones(5, 40, dtype=torch.int8), torch.ones(5), None),
        "int4": lambda: BWLA.int4_linear(x, torch.ones(5, 20, dtype=torch.uint8), torch.ones(5, 2), None, 32),
    }[op]
    y = call()
    assert y.requires_grad
    with torch.no_grad():
        assert torch.equal(call(), y)
    with pytest.raises(GradientError, match="no_grad"):
        y.sum().backward()


def test_compiled_graph_refuses_gradient_only_when_asked(path: str) -> None:
    linear = make_linear(9, 40)
    function = torch.compile(lambda x: run(x * 2, linear, 6) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 40, requires_grad=True)
    y = function(x)
    torch.testing.assert_close(y, run(x * 2, linear, 6) + 1)
    with pytest.raises(GradientError, match="no_grad"):
        y.sum().backward()


def test_edited_weights_are_never_stale(path: str) -> None:
    signs, scale, _, bias = linear = make_linear(9, 300, groups=3)
    other = make_linear(9, 300, groups=3, seed=5)
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    run(x, linear, 6)
    signs.copy_(other[0])
    scale.copy_(other[1])
    assert torch.equal(run(x, linear, 6), run(x, (other[0], other[1], None, bias), 6))


def test_recycled_tensors_are_never_stale(path: str) -> None:
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    for seed in range(20):  # each round frees tensors whose ids and addresses the next one takes
        linear = make_linear(8, 64, seed=seed)
        want = reference.linear(x, linear[0], linear[1], None, None, linear[3], 8)
        torch.testing.assert_close(run(x, linear, 8).double(), want, rtol=1e-5, atol=1e-4)  # 64 float32 additions
        del linear


def test_inference_tensors_are_never_stale(path: str) -> None:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        linear, other = make_linear(8, 64), make_linear(8, 64, seed=3)
        x = torch.ones(1, 64)
        run(x, linear, 8)
        linear[0].copy_(other[0])
        assert torch.equal(run(x, linear, 8), run(x, (other[0], *linear[1:]), 8))


def test_no_compiler_warns_once_and_is_right(no_compiler: None) -> None:
    linear = make_linear(9, 40)
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        y = run(x, linear, 6)
        run(x, linear, 6)
    assert len(seen) == 1
    assert "BWLA_CXX" in str(seen[0].message)
    want = reference.linear(x, linear[0], linear[1], None, None, linear[3], 6)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)  # 40 float32 additions


def test_all_paths_round_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row scales of one: sums of integers are exact in float32, so that both paths agree in every bit."""
    signs, scale, _, _ = make_linear(33, 500)
    x = torch.randn(7, 500, generator=torch.Generator().manual_seed(1))
    linear = (signs, torch.ones_like(scale), None, None)
    native.install()
    y = run(x, linear, 6)
    with without_native():
        assert torch.equal(run(x, linear, 6), y)
        monkeypatch.setattr(compiled, "kernels", lambda: None)
        assert torch.equal(run(x, linear, 6), y)


@pytest.mark.parametrize("bits", [6, 16])
def test_tokens_that_are_not_finite(path: str, bits: int) -> None:
    x = torch.ones(3, 40)
    x[1, 7] = float("nan")
    y = run(x, make_linear(9, 40), bits)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_wrong_shapes_are_named(path: str) -> None:
    signs, scale, low_rank, _ = make_linear(9, 40, rank=2)
    x = torch.randn(2, 40)
    nothing = (None,) * 5
    with pytest.raises(ShapeError, match="signs"):
        BWLA.linear(torch.randn(2, 50), signs, scale, *nothing, 6)
    with pytest.raises(ShapeError, match="scale"):
        BWLA.linear(x, signs, scale.expand(1, 9, 3), *nothing, 6)
    with pytest.raises(ShapeError, match="activation_bits"):
        BWLA.linear(x, signs, scale, *nothing, 9)
    with pytest.raises(ShapeError, match="together"):
        BWLA.linear(x, signs, scale, None, low_rank[0], None, None, None, 6)
    with pytest.raises(ShapeError, match="low-rank"):
        BWLA.linear(x, signs, scale, None, low_rank[1], low_rank[0], low_rank[2], None, 6)
    with pytest.raises(ShapeError, match="column_scale"):
        BWLA.linear(x, signs, scale, torch.ones(3), None, None, None, None, 6)
    with pytest.raises(ShapeError, match="group"):
        BWLA.linear_group(x, [signs], [scale], None, [], [None], [None], [None], 6, [None], None, [None])
    with pytest.raises(ShapeError, match="exponent"):
        BWLA.linear(x, signs, scale, *nothing, 6, torch.zeros((), dtype=torch.int8))
    with pytest.raises(ShapeError, match="codes"):
        BWLA.int8_linear(x, torch.zeros(3, 4, dtype=torch.int8), torch.ones(3), None)

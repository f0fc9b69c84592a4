"""Triton kernels against float64, run by Triton's interpreter: `test_on_triton.py` starts this file in its own process.

Not collected by name, since TRITON_INTERPRET must be set before Triton is imported.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from triton.runtime.errors import OutOfResources

from bwla_compiler.backend.prepare import prepare
from bwla_compiler.codegen import triton_spec
from bwla_compiler.codegen.triton_spec import Emitted, Kind, Tile
from bwla_compiler.errors import BwlaError, ShapeError
from bwla_compiler.numerics.planes import pack_signs, unpack_signs
from bwla_compiler.runtime import native, on_triton, ops, portable, triton_layout
from bwla_compiler.runtime.compiled import Linear
from bwla_compiler.runtime.halves import DECODED
from bwla_compiler.runtime.modules import PackedLinear
from bwla_compiler.runtime.portable import Prologue
from bwla_compiler.runtime.reference import int4_weight
from bwla_compiler.spec import LinearSpec, TransformSpec
from tests.wider import wider

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/runtime/test_on_triton.py instead"
assert os.environ.get("BWLA_KERNELS") == "triton"
assert ops.LIBRARY is not None

FLOAT = 2e-6
"""Of the largest entry: float32 sums of up to 384 terms in another order than float64's."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_linear(
    columns: int, out: int, *, planes: int = 1, groups: bool = False, rank: int = 0, bias: bool = False, seed: int = 0
) -> Linear:
    generator = seeded(seed + 31 * out)
    signs = torch.randint(0, 2, (planes, out, columns), dtype=torch.int8, generator=generator) * 2 - 1
    scale = torch.rand(planes, out, -(-columns // 128) if groups else 1, generator=generator) + 0.5
    low_rank = None
    if rank:
        low_rank = (
            torch.randint(-127, 128, (rank, columns), dtype=torch.int8, generator=generator),
            torch.randint(-127, 128, (out, rank), dtype=torch.int8, generator=generator),
            torch.rand(rank, generator=generator) * 1e-3,
        )
    return Linear(pack_signs(signs), scale, low_rank, torch.randn(out, generator=generator) if bias else None)


def exact(q: Tensor, token_scale: Tensor | None, linear: Linear, residual: Tensor | None = None) -> Tensor:
    """Return the linear of codes q [tokens, in] in float64."""
    columns = q.shape[1]
    wide = linear.scale.double()
    if wide.shape[2] > 1:
        wide = wide.repeat_interleave(128, 2)[..., :columns]
    y = q.double() @ (unpack_signs(linear.signs, columns) * wide).sum(0).T
    if linear.low_rank is not None:
        into, onto, scale = (t.double() for t in linear.low_rank)
        y = y + ((q.double() @ into.T) * scale) @ onto.T
    y = y if token_scale is None else y * token_scale.double()
    y = y if linear.bias is None else y + linear.bias.double()
    return y if residual is None else y + residual.double()


def relative(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want).abs().max() / want.abs().max())


# ---------------------------------------------------------------- linears

FORMATS = {
    "plain": {},
    "planes": {"planes": 2, "bias": True},
    "groups": {"groups": True, "rank": 3},
    "all": {"planes": 2, "groups": True, "rank": 17, "bias": True},
}


@pytest.mark.parametrize("tokens, columns, bits", [(3, 100, 8), (5, 128, 16), *wider((20, 200, 6), (16, 384, 4))])
@pytest.mark.parametrize("case", FORMATS)
def test_matrix_kernel(case: str, tokens: int, columns: int, bits: int) -> None:
    x = torch.randn(tokens, columns, generator=seeded(1))
    column_scale = torch.rand(columns, generator=seeded(2)) + 0.5
    members = [make_linear(columns, out, **FORMATS[case]) for out in (64, 17, 1, 130)]
    q, token_scale = portable.rounded(x, column_scale, bits)
    for got, member in zip(on_triton.linears(x, members, column_scale, bits), members, strict=True):
        assert relative(got, exact(q, token_scale, member)) < FLOAT


@pytest.mark.parametrize(
    "case, columns, out, bits", [("plain", 100, 17, 8), ("planes", 384, 64, 6), ("all", 200, 1, 4)]
)
def test_decode_kernel(case: str, columns: int, out: int, bits: int) -> None:
    x = torch.randn(1, columns, generator=seeded(1))
    members = [make_linear(columns, out, **FORMATS[case])]
    q, token_scale = portable.rounded(x, None, bits)
    (got,) = on_triton.linears(x, members, None, bits)
    assert relative(got, exact(q, token_scale, members[0])) < FLOAT


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tile], None]:
    """Return a function that fixes the tile of every linear kernel."""
    return lambda chosen: monkeypatch.setattr(on_triton, "tile_for", lambda *arguments: chosen)


@pytest.mark.parametrize(
    "columns, chosen",
    [
        (300, Tile(rows=64, tokens=1, warps=4, stages=2, split=2)),  # more groups than side by side
        (2060, Tile(rows=16, tokens=1, warps=2, stages=2, split=16)),  # a low-rank pair in two parts
    ],
)
def test_decode_kernel_with_other_tiles(columns: int, chosen: Tile, tile: Callable[[Tile], None]) -> None:
    tile(chosen)
    x = torch.randn(1, columns, generator=seeded(1))
    member = make_linear(columns, 9, groups=True, rank=2)
    q, token_scale = portable.rounded(x, None, 8)
    (got,) = on_triton.linears(x, [member], None, 8)
    assert relative(got, exact(q, token_scale, member)) < FLOAT


@pytest.mark.parametrize("case, bits", [("plain", 8), ("planes", 6), ("all", 8), *wider(("groups", 4), ("planes", 16))])
def test_matrix_kernel_in_parts(case: str, bits: int, tile: Callable[[Tile], None]) -> None:
    tile(Tile(rows=32, tokens=8, warps=2, stages=2, parts=3))
    x = torch.randn(9, 1100, generator=seeded(1))  # nine groups and two blocks of tokens
    members = [make_linear(1100, out, **FORMATS[case]) for out in (40, 7)]
    added = [torch.randn(9, 40, generator=seeded(6)), None]
    q, token_scale = portable.rounded(x, None, bits)
    results = on_triton.fused(x, Prologue(), members, added, None, bits)
    for got, member, residual in zip(results, members, added, strict=True):
        assert relative(got, exact(q, token_scale, member, residual)) < FLOAT


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("groups", [False, True])
def test_integers_are_exact(tokens: int, groups: bool) -> None:
    # codes with a token scale of 1, unit row scales: nothing is rounded, so results are the integers themselves
    x = torch.randint(-127, 128, (tokens, 300), generator=seeded(3)).float()
    x[:, 7] = 127
    linear = make_linear(300, 33, groups=groups)
    linear = Linear(linear.signs, torch.ones_like(linear.scale), None, None)
    (got,) = on_triton.linears(x, [linear], None, 8)
    assert torch.equal(got, x @ unpack_signs(linear.signs, 300)[0].float().T)


def test_members_of_different_formats_share_codes() -> None:
    x = torch.randn(4, 200, generator=seeded(5))
    members = [
        make_linear(200, 40, rank=3),
        make_linear(200, 24, planes=2, bias=True),
        make_linear(200, 8, rank=20, bias=True),
        make_linear(200, 33, groups=True),
    ]
    q, token_scale = portable.rounded(x, None, 6)
    for got, member in zip(on_triton.linears(x, members, None, 6), members, strict=True):
        assert relative(got, exact(q, token_scale, member)) < FLOAT


def test_residuals_are_added_before_the_one_cast() -> None:
    x = torch.randn(4, 64, generator=seeded(5)).bfloat16()
    members = [make_linear(64, 40), make_linear(64, 24, bias=True), make_linear(64, 9)]
    added = [None, torch.randn(4, 24, generator=seeded(6)), torch.randn(4, 9, generator=seeded(7)).bfloat16()]
    q, token_scale = portable.rounded(x, None, 8)
    results = on_triton.fused(x, Prologue(), members, added, None, 8)
    for got, member, residual in zip(results, members, added, strict=True):
        assert got.dtype == torch.bfloat16
        # bfloat16 has 8 bits; the interpreter truncates where devices round, hence a whole unit and not half of one
        assert relative(got, exact(q, token_scale, member, residual)) < 2**-7


# ---------------------------------------------------------------- codes


def rounded(x: Tensor, column_scale: Tensor | None, bits: int, steps: Prologue | None = None) -> tuple[Tensor, Tensor]:
    found = on_triton._rounded(x, steps or Prologue(), column_scale, bits)
    assert found.token_scale is not None
    assert found.code_sum is not None
    assert torch.equal(found.code_sum, found.values.sum(1).int())
    assert not found.values[:, x.shape[1] :].any()
    return found.values[:, : x.shape[1]].float(), found.token_scale


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("columns", [1, 100, 128, 200])
def test_codes_equal_torch(columns: int, bits: int) -> None:
    x = torch.randn(6, columns, generator=seeded(columns))
    x[1] = 0
    x[2] *= 1e-42  # denormal
    x[3] = torch.arange(columns) % 7 / 2  # ties
    x[4] *= 1e30
    column_scale = torch.rand(columns, generator=seeded(2)) + 0.5
    for scale in (None, column_scale):
        want, want_scale = portable.rounded(x, scale, bits)
        got, got_scale = rounded(x, scale, bits)
        assert torch.equal(got, want)
        assert want_scale is not None
        assert torch.equal(got_scale, want_scale[:, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_has_no_codes_and_leaves_the_others_alone(bad: float) -> None:
    x = torch.randn(3, 50, generator=seeded(0))
    x[1, 4] = bad
    codes, scale = rounded(x, None, 8)
    want, want_scale = portable.rounded(x, None, 8)
    assert want_scale is not None
    assert torch.equal(codes, want)
    assert torch.equal(scale.isnan(), torch.tensor([False, True, False]))
    (y,) = on_triton.linears(x, [make_linear(50, 20)], None, 8)
    assert torch.equal(y.isnan().all(1), scale.isnan())
    assert y[0].isfinite().all()


# ---------------------------------------------------------------- prologues and changes of basis

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


def make_steps(kind: str, shape: Sequence[int], n1: int, n2: int, parts: str) -> Prologue:
    """Return a prologue with random tensors; parts: which of scale, left, right it has, by their first letters."""
    generator, n = seeded(9), n1 * n2
    norm = kind.endswith("_norm")
    return Prologue(
        kind=kind,
        gain=torch.rand(n, generator=generator) + 0.5 if norm else None,
        shift=torch.randn(n, generator=generator) if kind == "layer_norm" else None,
        gate=torch.randn(*shape, generator=generator) if kind.endswith("_mul") else None,
        scale=torch.rand(n, generator=generator) + 0.5 if "s" in parts else None,
        left=torch.randn(n1, n1, generator=generator) / n1**0.5 if "l" in parts else None,
        right=torch.randn(n2, n2, generator=generator) / n2**0.5 if "r" in parts else None,
    )


def prologue64(x: Tensor, steps: Prologue) -> Tensor:
    """Return the prologue of x [tokens, n] in float64."""
    y = x.double()
    if steps.kind == "rms_norm":
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + steps.eps)
    elif steps.kind == "layer_norm":
        y = y - y.mean(-1, keepdim=True)
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + steps.eps)
    elif steps.kind != "none":
        y = ACTIVATIONS[steps.kind.removesuffix("_mul")](y)
    for factor in (steps.gate, steps.gain):
        y = y if factor is None else y * factor.double()
    y = y if steps.shift is None else y + steps.shift.double()
    y = y if steps.scale is None else y * steps.scale.double()
    n2 = steps.right.shape[0] if steps.right is not None else x.shape[1]
    n1 = steps.left.shape[0] if steps.left is not None else x.shape[1] // n2
    matrix = y.reshape(x.shape[0], n1, -1)
    if steps.right is not None:
        matrix = matrix @ steps.right.double()
    if steps.left is not None:
        matrix = steps.left.double().T @ matrix
    return matrix.reshape(x.shape)


def check_codes(x: Tensor, steps: Prologue, bits: int) -> None:
    """Hold codes against float64: each is the nearest integer, but for float32's error before it is rounded."""
    want = prologue64(x, steps)
    codes, scale = rounded(x, None, bits, steps)
    limit = 2 ** (bits - 1) - 1
    assert relative(scale, want.abs().amax(1) / limit) < FLOAT
    assert float((codes.double() - want / (want.abs().amax(1, keepdim=True) / limit)).abs().max()) < 0.5 + limit * FLOAT


@pytest.mark.parametrize("kind", get_args(Kind))
def test_prologues(kind: str) -> None:
    x = 2 * torch.randn(3, 100, generator=seeded(4)) + 0.3
    steps = make_steps(kind, x.shape, 10, 10, "s")
    check_codes(x, steps, 8)
    floats = on_triton._unrounded(x, steps, None).values
    assert relative(floats[:, :100], prologue64(x, steps)) < FLOAT
    assert floats.shape == (3, 128)
    assert not floats[:, 100:].any()


@pytest.mark.parametrize("parts", ["slr", "lr", "l", "r", "s"])
@pytest.mark.parametrize("n1, n2", [(6, 10), (40, 3), *wider((16, 8), (3, 40), (1, 64))])
def test_changes_of_basis(n1: int, n2: int, parts: str) -> None:
    x = torch.randn(3, n1 * n2, generator=seeded(4))
    steps = make_steps("none", x.shape, n1, n2, parts)
    check_codes(x, steps, 6)
    got = on_triton.transform(x, steps.scale, steps.left, steps.right)
    assert relative(got, prologue64(x, steps)) < FLOAT


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm", "silu_mul", "gelu"])
def test_prologue_and_basis_together(kind: str) -> None:
    x = 2 * torch.randn(2, 240, generator=seeded(4)) + 0.3
    check_codes(x, make_steps(kind, x.shape, 12, 20, "slr"), 8)
    check_codes(x, make_steps(kind, x.shape, 24, 10, "slr"), 4)


@pytest.mark.parametrize("kind, parts", [("silu_mul", "slr"), ("rms_norm", "sl"), *wider(("layer_norm", "r"))])
def test_factors_too_large_for_one_program(kind: str, parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_spec, "LARGEST_FACTORED", 256)
    calls = spied(monkeypatch)
    x = torch.randn(3, 600, generator=seeded(4))
    steps = make_steps(kind, x.shape, 20, 30, parts)
    check_codes(x, steps, 8)
    assert calls == ["prologue"] * (1 + ("l" in parts) + ("r" in parts))
    column_scale = torch.rand(600, generator=seeded(2)) + 0.5
    floats = on_triton._unrounded(x, steps, column_scale).values
    assert relative(floats[:, :600], prologue64(x, steps) * column_scale.double()) < FLOAT
    assert not floats[:, 600:].any()


def test_factors_that_the_device_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, tried = on_triton.launch, []

    def small_device(emitted: Emitted, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        if {"left", "right"} <= {name for name, _ in emitted.parameters}:
            tried.append(emitted.name)
            raise OutOfResources(200_000, 100_000, "shared memory")
        launch(emitted, grid, arguments)

    monkeypatch.setattr(on_triton, "launch", small_device)
    x = torch.randn(3, 420, generator=seeded(4))
    steps = make_steps("rms_norm", x.shape, 20, 21, "slr")
    check_codes(x, steps, 8)
    check_codes(x, steps, 8)
    assert tried == ["prologue"], "asked once, remembered then"


def test_a_kernel_without_stages_that_the_device_cannot_hold_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device(emitted: Emitted, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        raise OutOfResources(200_000, 100_000, "shared memory")

    monkeypatch.setattr(on_triton, "launch", no_device)
    for _ in range(2):
        with pytest.raises(OutOfResources):
            on_triton._rounded(torch.randn(3, 420), Prologue("rms_norm", 1e-6), None, 8)


def test_rows_too_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_spec, "LARGEST_TILE", 512)
    with pytest.raises(ShapeError, match="a row of 600 channels"):
        on_triton.linears(torch.randn(3, 600), [make_linear(600, 8)], None, 8)


@pytest.mark.parametrize("precision", ["tf32x2", "tf32x3"])
def test_products_in_parts_are_the_same_sums(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the interpreter multiplies in float32 whatever it is told, so this holds the parts' arithmetic, not tf32's error
    monkeypatch.setattr(on_triton, "precision_of", lambda x, *factors: precision)
    x = torch.randn(3, 60, generator=seeded(4))
    check_codes(x, make_steps("rms_norm", x.shape, 6, 10, "slr"), 8)
    member = make_linear(60, 20, rank=3)
    for bits in (8, 16):
        q, token_scale = portable.rounded(x, None, bits)
        (got,) = on_triton.linears(x, [member], None, bits)
        assert relative(got, exact(q, token_scale, member)) < FLOAT


def test_float16_factors_are_exact_in_tf32() -> None:
    assert triton_layout.exact_in_tf32(torch.randn(8, 8, generator=seeded(0)).half().float() * 2.0**-20)
    assert not triton_layout.exact_in_tf32(torch.randn(8, 8, generator=seeded(0)))


def test_fused_is_the_steps_one_by_one() -> None:
    x = torch.randn(5, 96, generator=seeded(8))
    steps = make_steps("rms_norm", x.shape, 12, 8, "slr")
    column_scale = torch.rand(96, generator=seeded(2)) + 0.5
    members = [make_linear(96, 40, rank=3), make_linear(96, 17, bias=True)]
    added = [torch.randn(5, 40, generator=seeded(6)), None]
    found = on_triton._rounded(x, steps, column_scale, 6)
    assert found.token_scale is not None
    results = on_triton.fused(x, steps, members, added, column_scale, 6)
    for got, member, residual in zip(results, members, added, strict=True):
        want = exact(found.values[:, :96], found.token_scale[:, None], member, residual)
        assert relative(got, want) < FLOAT


# ---------------------------------------------------------------- low-rank pairs beside the rounding


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("parts", ["", "slr", *wider("l", "r")])
def test_the_first_half_of_low_rank_pairs_is_exact(tokens: int, parts: str) -> None:
    x = torch.randn(tokens, 240, generator=seeded(4))
    steps = make_steps("rms_norm", x.shape, 12, 20, parts)
    pairs = [make_linear(240, 20, rank=rank, seed=rank).low_rank for rank in (17, 1, 8)]
    into, scale = torch.cat([pair[0] for pair in pairs if pair]), torch.cat([pair[2] for pair in pairs if pair])
    plain, found = (on_triton._rounded(x, steps, None, 6, own) for own in ((), [pair for pair in pairs if pair]))
    for name in ("values", "token_scale", "code_sum"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), "as without them"
    # integers below 2^24, then one float32 product: nothing is left to rounding
    assert found.mixed is not None
    assert torch.equal(found.mixed[0], (found.values[:, :240].float() @ into.float().T) * scale)


@pytest.mark.parametrize(
    "tokens, beside, names",
    [
        (1, True, ["prologue", "linear_gemv"]),
        (8, True, ["prologue", "linear_dot"]),
        (9, True, ["prologue", "low_rank", "linear_dot"]),
        (1, False, ["prologue", "low_rank", "linear_gemv"]),
        *wider((8, False, ["prologue", "low_rank", "linear_dot"])),
    ],
)
def test_low_rank_pairs_beside_the_rounding_and_after_it(
    tokens: int, beside: bool, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not beside:
        monkeypatch.setattr(triton_spec, "LARGEST_MIXED", 0)
    calls = spied(monkeypatch)
    x = torch.randn(tokens, 1100, generator=seeded(5))
    members = [make_linear(1100, 40, rank=18), make_linear(1100, 17, bias=True), make_linear(1100, 24, rank=3)]
    q, token_scale = portable.rounded(x, None, 8)
    for got, member in zip(on_triton.linears(x, members, None, 8), members, strict=True):
        assert relative(got, exact(q, token_scale, member)) < FLOAT
    assert calls == names


def test_low_rank_pairs_beside_the_last_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_spec, "LARGEST_FACTORED", 256)
    calls = spied(monkeypatch)
    x = torch.randn(2, 600, generator=seeded(4))
    steps, member = make_steps("silu_mul", x.shape, 20, 30, "slr"), make_linear(600, 33, rank=11)
    codes = on_triton._rounded(x, steps, None, 6)
    assert codes.token_scale is not None
    (got,) = on_triton.fused(x, steps, [member], [None], None, 6)
    assert relative(got, exact(codes.values[:, :600], codes.token_scale[:, None], member)) < FLOAT
    assert calls == [*["prologue"] * 6, "linear_dot"]


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("tokens, columns, out", [(1, 100, 17), (1, 1040, 8), (3, 100, 70), *wider((40, 200, 130))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear(tokens: int, columns: int, out: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, columns, generator=seeded(1)).to(dtype)
    codes = torch.randint(-127, 128, (out, columns), dtype=torch.int8, generator=seeded(2))
    scale, bias = torch.rand(out, generator=seeded(3)) + 0.5, torch.randn(out, generator=seeded(4))
    got = on_triton.int8_linear(x, codes, scale, bias)
    want = x.double() @ codes.double().T * scale.double() + bias.double()
    assert got.dtype == dtype
    assert relative(got, want) < (FLOAT if dtype == torch.float32 else 2**-7)  # truncated by the interpreter


@pytest.mark.parametrize(
    "tokens, columns, out, group", [(1, 101, 17, 32), (3, 101, 70, 64), *wider((1, 1040, 8, 128), (40, 200, 130, 128))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_linear(tokens: int, columns: int, out: int, group: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, columns, generator=seeded(1)).to(dtype)
    codes = torch.randint(0, 256, (out, -(-columns // 2)), dtype=torch.uint8, generator=seeded(2))
    scale, bias = torch.randn(out, -(-columns // group), generator=seeded(3)), torch.randn(out, generator=seeded(4))
    got = on_triton.int4_linear(x, codes, scale, bias, group)
    want = x.double() @ int4_weight(codes, scale, columns, group).T + bias.double()
    assert got.dtype == dtype
    assert relative(got, want) < (FLOAT if dtype == torch.float32 else 2**-7)  # truncated by the interpreter


# ---------------------------------------------------------------- layouts and dispatch


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that names each kernel launched from here on."""
    calls: list[str] = []
    launch = on_triton.launch
    monkeypatch.setattr(on_triton, "launch", lambda e, grid, args: (calls.append(e.name), launch(e, grid, args))[1])
    return calls


def test_layout_p() -> None:
    signs = torch.randint(0, 2, (2, 5, 200), dtype=torch.int8, generator=seeded(0)) * 2 - 1
    words = triton_layout.packed_signs(pack_signs(signs), 200)
    assert words.shape == (2, 2, 5, 4)
    for channel in range(256):
        group, p, c, b = channel // 128, channel % 128 // 16, channel % 16 // 4, channel % 4
        bit = (words[:, group, :, c] >> (8 * b + p)) & 1
        assert torch.equal(bit, (signs[:, :, channel] > 0).int() if channel < 200 else torch.zeros_like(bit))


def test_packing_is_kept_until_the_signs_change() -> None:
    signs = pack_signs(torch.ones(1, 4, 64, dtype=torch.int8))
    first = triton_layout.packed_signs(signs, 64)
    assert triton_layout.packed_signs(signs, 64) is first
    signs.zero_()
    assert not triton_layout.packed_signs(signs, 64).any()


def test_operators_go_to_triton_and_leave_cpp_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("the C++ operators were built")

    monkeypatch.setattr(native, "operators", refuse)
    calls = spied(monkeypatch)
    x = torch.randn(2, 3, 60, generator=seeded(1))
    member = make_linear(60, 20, bias=True)
    y = torch.ops.bwla.linear(x, member.signs, member.scale, None, None, None, None, member.bias, 8)
    q, token_scale = portable.rounded(x.view(6, 60), None, 8)
    assert relative(y.view(6, 20), exact(q, token_scale, member)) < FLOAT
    left = torch.randn(6, 6, generator=seeded(2))
    z = torch.ops.bwla.transform(x.bfloat16(), None, left, None)
    assert z.dtype == torch.bfloat16
    want = prologue64(x.bfloat16().view(6, 60), Prologue(left=left))
    assert relative(z.view(6, 60), want) < 2**-7  # truncated to bfloat16 by the interpreter
    assert calls == ["prologue", "linear_dot", "prologue"]
    assert torch.ops.bwla.linear(x[:0], member.signs, member.scale, None, None, None, None, None, 8).shape == (0, 3, 20)
    codes = torch.randint(-127, 128, (5, 60), dtype=torch.int8, generator=seeded(3))
    assert torch.ops.bwla.int8_linear(x, codes, torch.ones(5), None).shape == (2, 3, 5)
    assert calls[3:] == ["int8_dot"]


def test_what_does_not_fit_is_refused() -> None:
    x, square = torch.randn(2, 60), torch.randn(7, 7)
    with pytest.raises(ShapeError, match="do not multiply to the 60 channels"):
        on_triton.transform(x, None, square, None)
    with pytest.raises(ShapeError, match="right factor has shape \\[7, 5\\]: it must be square"):
        on_triton.transform(x, None, None, torch.randn(7, 5))
    with pytest.raises(ShapeError, match="prologue 'swish' is not known: expected one of none, rms_norm"):
        on_triton.fused(x, Prologue("swish"), [make_linear(60, 8)], [None], None, 8)
    with pytest.raises(ShapeError, match="gain \\[59\\]: expected \\[60\\]"):
        on_triton.fused(x, Prologue("rms_norm", gain=torch.ones(59)), [make_linear(60, 8)], [None], None, 8)
    with pytest.raises(ShapeError, match="gate \\[2, 30\\]: expected the shape of the input, \\[2, 60\\]"):
        on_triton.fused(x, Prologue("silu_mul", gate=torch.randn(2, 30)), [make_linear(60, 8)], [None], None, 8)


def test_a_graph_prepared_derives_nothing_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    member = make_linear(60, 20, rank=2, bias=True)
    assert member.low_rank is not None
    names = ("x", "signs", "scale", "into", "onto", "rank_scale", "bias", "codes", "head_scale", "left")
    graph = Graph()
    x, signs, scale, into, onto, rank_scale, bias, codes, head_scale, left = map(graph.placeholder, names)
    turned = graph.call_function(torch.ops.bwla.transform.default, (x, None, left, None))
    y = graph.call_function(
        torch.ops.bwla.linear.default, (turned, signs, scale, None, into, onto, rank_scale, bias, 8)
    )
    graph.output(graph.call_function(torch.ops.bwla.int8_linear.default, (y, codes, head_scale, None)))
    gm = GraphModule({}, graph)
    double = [t.double() for t in (member.scale, member.low_rank[2], torch.ones(5))]  # float32 copies are derived
    inputs = (torch.randn(1, 60), member.signs, double[0], *member.low_rank[:2], double[1], member.bias,
              torch.ones(5, 20, dtype=torch.int8), double[2], torch.eye(6))  # fmt: skip
    prepared = prepare(gm, inputs)
    assert len(prepared) == 4  # signs, and what is float64: the bias and the factor are read as they are
    for cache in (triton_layout.PACKED_SIGNS, triton_layout.PACKED_SCALES, triton_layout.FLOATS):
        monkeypatch.setattr(cache, "get", only_known(cache))
    found = gm(*inputs)
    assert found.isfinite().all()
    monkeypatch.undo()
    double[2].mul_(2)
    assert torch.equal(gm(*inputs), found), "the buffer is as it was"
    prepared.renew(inputs)
    assert torch.equal(gm(*inputs), 2 * found)
    other = [*inputs]
    other[8] = torch.ones(5, dtype=torch.float64)  # another tensor in its place
    prepared.watching(gm)(*other)
    assert torch.equal(gm(*inputs), found)
    other[8] = torch.ones(6, dtype=torch.float64)
    with pytest.raises(BwlaError, match=r"is \[6\] on cpu by now, and was \[5\] on cpu: call torch._dynamo.reset"):
        prepared.renew(other)


def test_a_module_that_a_graph_calls_derives_nothing_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LinearSpec(60, (20,), rank=2, transform=TransformSpec("kronecker", 6, 10, left=True), bias=True)
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("linear", (x,)))
    gm = GraphModule(torch.nn.ModuleDict({"linear": PackedLinear(spec)}), graph)
    assert len(prepare(gm, [torch.randn(1, 60)])) == 0
    for cache in (triton_layout.PACKED_SIGNS, triton_layout.PACKED_SCALES, triton_layout.FLOATS, DECODED):
        monkeypatch.setattr(cache, "get", only_known(cache))
    assert not gm(torch.randn(1, 60)).any()


def only_known(cache: Any) -> Callable[..., Any]:
    """Return the cache's `get`, which fails where something has to be derived."""
    get = cache.get

    def known(tensor: Tensor, make: Callable[[], Any], **rest: Any) -> Any:
        def refuse() -> Any:
            raise AssertionError("derived while the graph runs")

        return get(tensor, refuse, **rest)

    return known

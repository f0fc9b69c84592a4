"""Signs and scales: closed forms, brute force, a falling objective, GPTQ's start."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bwla_compiler.errors import CalibrationError, ShapeError
from bwla_compiler.numerics.feedback import gptq_signs
from bwla_compiler.numerics.hessian import inverse_factor
from bwla_compiler.numerics.psp import hessian_error
from bwla_compiler.numerics.signs import descend_signs, round_signs, row_scale, weighted_scale


def problem(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return a weight and a correlated, damped Hessian."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator, dtype=dtype)
    X = torch.randn(3 * n, n, generator=generator, dtype=dtype) @ torch.randn(n, n, generator=generator, dtype=dtype)
    H = X.mT @ X / (3 * n)
    return W, H + 0.1 * H.diagonal().mean() * torch.eye(n, dtype=dtype)


def objective(W: Tensor, H: Tensor, signs: Tensor) -> Tensor:
    """Return each row's error under its best scale [m]."""
    E = W - weighted_scale(W, signs, H) * signs
    return ((E @ H) * E).sum(1)


def test_row_scale_is_the_best_of_a_grid() -> None:
    W, _ = problem(5, 7)
    scale = row_scale(W)
    best = (W - scale * W.sign()).square().sum(1)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (best < (W - factor * scale * W.sign()).square().sum(1)).all()


def test_row_scale_refuses_a_vector() -> None:
    with pytest.raises(ShapeError, match=r"\[3\]"):
        row_scale(torch.zeros(3))


def test_rounding_has_no_zero_sign() -> None:
    signs, scale = round_signs(torch.tensor([[0.0, -2.0, 1.0]]))
    assert signs.tolist() == [[1, -1, 1]]
    assert signs.dtype == torch.int8
    assert scale.tolist() == [[1.0]]


def test_weighted_scale_is_stationary_and_reduces_to_the_row_scale() -> None:
    W, H = problem(6, 9)
    signs, scale = round_signs(W)
    torch.testing.assert_close(weighted_scale(W, signs, torch.eye(9, dtype=W.dtype)), scale)
    E = W - weighted_scale(W, signs, H) * signs
    gradient = ((E @ H) * signs).sum(1)
    assert float(gradient.abs().max()) < 1e-9  # float64; terms of size 10


@given(m=st.integers(1, 9), n=st.integers(1, 50), seed=st.integers(0, 99), block=st.sampled_from([1, 3, 16, 40, 128]))
@settings(deadline=None, max_examples=40)
def test_descent_never_rises_and_its_scale_is_positive(m: int, n: int, seed: int, block: int) -> None:
    W, H = problem(m, n, seed)
    start, _ = round_signs(W)
    losses = [objective(W, H, start)]
    for sweeps in (1, 2, 3, 6):
        signs, scale = descend_signs(W, H, signs=start, sweeps=sweeps, block=block)
        assert signs.dtype == torch.int8
        assert (signs.abs() == 1).all()
        assert (scale > 0).all()
        losses.append(objective(W, H, signs))
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-10)).all()  # float64 rounding


@pytest.mark.parametrize("block", [1, 5, 17, 64, 128])
def test_blocks_do_not_change_the_result(block: int) -> None:
    W, H = problem(8, 70)
    start, _ = round_signs(W)
    expected = descend_signs(W, H, signs=start, sweeps=3, block=70)
    found = descend_signs(W, H, signs=start, sweeps=3, block=block)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def plain_sweep(W: Tensor, H: Tensor, B: Tensor) -> Tensor:
    """Return the signs after one textbook sweep: one column at a time, everything recomputed."""
    a = weighted_scale(W, B, H)
    B = B.double() * torch.where(a < 0, -1, 1)
    for j in range(W.shape[1]):
        wish = ((W - a.abs() * B) @ H)[:, j] + a.abs()[:, 0] * B[:, j] * H[j, j]
        B[:, j] = torch.where(wish < 0, -1.0, 1.0)
    return B


def test_one_sweep_equals_the_textbook() -> None:
    W, H = problem(6, 40)
    start, _ = round_signs(W)
    signs, _ = descend_signs(W, H, signs=start, sweeps=1, block=16)
    expected = plain_sweep(W, H, start)
    a = weighted_scale(W, expected, H)
    assert torch.equal(signs.double(), expected * torch.where(a < 0, -1, 1))


def test_the_end_is_optimal_under_any_single_flip() -> None:
    W, H = problem(10, 12)
    start, _ = round_signs(W)
    signs, scale = descend_signs(W, H, signs=start, sweeps=100)
    E = W - scale * signs
    best = ((E @ H) * E).sum(1)
    assert (best <= objective(W, H, start) + 1e-12).all()
    for j in range(12):
        flipped = signs.clone()
        flipped[:, j] *= -1
        E = W - scale * flipped
        assert (((E @ H) * E).sum(1) >= best - 1e-9).all()


def test_descent_lies_between_rounding_and_the_best_of_all_signs() -> None:
    W, H = problem(20, 8)
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=torch.float64)
    best = torch.stack([objective(W, H, b.expand(20, 8)) for b in every]).amin(0)
    found = objective(W, H, descend_signs(W, H, sweeps=50)[0])
    rounded = objective(W, H, round_signs(W)[0])
    assert (found >= best - 1e-9).all()
    assert found.sum() < 0.7 * rounded.sum()  # correlated inputs: rounding is far off
    assert found.sum() < 1.5 * best.sum()


def test_a_binary_weight_is_kept_exactly() -> None:
    _, H = problem(1, 24)
    generator = torch.Generator().manual_seed(5)
    B = torch.randint(0, 2, (9, 24), generator=generator).double() * 2 - 1
    scale = torch.rand(9, 1, generator=generator, dtype=torch.float64) + 0.1
    signs, found = descend_signs(scale * B, H, signs=B.to(torch.int8))
    assert torch.equal(signs.double(), B)
    torch.testing.assert_close(found, scale)


def test_with_an_identity_hessian_descent_is_rounding() -> None:
    W, _ = problem(6, 33)
    signs, scale = descend_signs(W, torch.eye(33, dtype=W.dtype))
    expected = round_signs(W)
    assert torch.equal(signs, expected[0])
    torch.testing.assert_close(scale, expected[1])


def test_a_negative_scale_flips_its_row() -> None:
    W, H = problem(4, 10)
    start, _ = round_signs(W)
    signs, scale = descend_signs(W, H, signs=-start, sweeps=0)
    mirrored = descend_signs(W, H, signs=start, sweeps=0)
    assert (scale > 0).all()
    assert torch.equal(signs, mirrored[0])


def test_the_start_is_not_overwritten_and_zero_rows_stay_finite() -> None:
    W, H = problem(4, 10)
    W[1] = 0
    start, _ = round_signs(W)
    kept = start.clone()
    signs, scale = descend_signs(W, H, signs=start)
    assert torch.equal(start, kept)
    assert float(scale[1]) == 0
    assert (signs.abs() == 1).all()


def test_early_stop_and_progress() -> None:
    W, H = problem(3, 6)
    seen: list[int] = []
    descend_signs(W, H, sweeps=500, progress=lambda _, done, total: seen.append(done))
    assert len(seen) < 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_comes_near_float64(dtype: torch.dtype) -> None:
    W, H = problem(16, 64)
    W = W.to(dtype).double()
    signs, scale = descend_signs(W.to(dtype), H.float())
    assert scale.dtype == torch.float32
    exact, _ = descend_signs(W, H)
    # near-ties may fall either way in float32 and lead to another minimum of like depth
    assert objective(W, H, signs).sum() < 1.1 * objective(W, H, exact).sum()


def test_inverse_factor() -> None:
    _, H = problem(1, 30)
    U = inverse_factor(H)
    torch.testing.assert_close(U, U.triu())
    torch.testing.assert_close(U.mT @ U @ H, torch.eye(30, dtype=H.dtype), atol=1e-8, rtol=0)  # cond(H) ~ 1e3


def plain_gptq(W: Tensor, H: Tensor) -> Tensor:
    """Return GPTQ's signs as in the paper: an explicit inverse, one column at a time."""
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    W, alpha = W.clone(), W.abs().mean(1)
    signs = torch.empty_like(W)
    for j in range(W.shape[1]):
        signs[:, j] = torch.where(W[:, j] < 0, -1.0, 1.0)
        error = (W[:, j] - alpha * signs[:, j]) / U[j, j]
        W[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
    return signs


@pytest.mark.parametrize("block", [1, 7, 32, 128])
def test_gptq_equals_the_textbook(block: int) -> None:
    W, H = problem(9, 50)
    kept = W.clone()
    signs = gptq_signs(W, H, block=block)
    assert signs.dtype == torch.int8
    assert torch.equal(signs.double(), plain_gptq(W, H))
    assert torch.equal(W, kept)


def test_gptq_with_a_transposed_weight_leaves_it_alone() -> None:
    W, H = problem(5, 6)
    transposed = W.mT.contiguous().mT
    signs = gptq_signs(transposed, H)
    assert torch.equal(transposed, W)
    assert torch.equal(signs, gptq_signs(W, H))


def test_refusals() -> None:
    W, H = problem(3, 5)
    with pytest.raises(ShapeError, match="Hessian"):
        descend_signs(W, H[:4, :4])
    with pytest.raises(ShapeError, match="Hessian"):
        hessian_error(W, H[:4])
    with pytest.raises(CalibrationError, match="raise the damping"):
        descend_signs(W, torch.zeros(5, 5, dtype=W.dtype))

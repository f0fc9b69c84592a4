"""Signs beside an int8 low-rank pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics import psp
from bwla_compiler.numerics.psp import hessian_error, int8_factors, split_low_rank
from bwla_compiler.numerics.signs import descend_signs


def problem(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * n, n, generator=generator) @ torch.randn(n, n, generator=generator) / n**0.5
    return torch.randn(m, n, generator=generator), X.mT @ X / (4 * n) + 0.2 * torch.eye(n)


def test_hessian_error_is_the_output_error() -> None:
    generator = torch.Generator().manual_seed(0)
    X, E = torch.randn(50, 6, generator=generator).double(), torch.randn(4, 6, generator=generator).double()
    expected = float((X @ E.mT).square().sum() / 50)
    assert hessian_error(E, X.mT @ X / 50) == pytest.approx(expected, rel=1e-12)


@given(m=st.integers(1, 20), n=st.integers(1, 20), r=st.integers(0, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_int8_factors_are_within_half_a_step(m: int, n: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    U, V = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator) * 100
    codes_out, codes_in, scale = int8_factors(U, V)
    assert codes_out.dtype == codes_in.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (r,)
    product = (codes_out * scale) @ codes_in.float()
    # per rank |du| <= u/254, |dv| <= v/254 of the largest u, v: u dv + v du + du dv; 1% for float32
    bound = (U.abs().amax(0) * V.abs().amax(1) * (2 / 254 + 1 / 254**2)).sum() if r else torch.tensor(0.0)
    assert float((product - U @ V).abs().max()) <= 1.01 * float(bound)


def test_int8_factors_of_a_rounded_pair_give_its_codes_back() -> None:
    W, H = problem(20, 24)
    split = split_low_rank(W, H, rank=3)
    codes_out, codes_in, scale = int8_factors(split.low_rank_out, split.low_rank_in)
    # float32 rounding of the shared scale
    torch.testing.assert_close((codes_out * scale) @ codes_in.float(), split.low_rank_out @ split.low_rank_in)
    assert int(codes_out.abs().max()) == 127


def test_int8_factors_of_zeros_are_zeros() -> None:
    codes_out, codes_in, scale = int8_factors(torch.zeros(3, 2), torch.ones(2, 4))
    assert not codes_out.any()
    assert codes_in.all()
    assert scale.isfinite().all()


def test_int8_factors_refuse_different_ranks() -> None:
    with pytest.raises(ShapeError, match="rank"):
        int8_factors(torch.zeros(3, 2), torch.zeros(3, 4))


def test_more_rank_lowers_the_error_and_the_best_is_kept() -> None:
    W, H = problem(48, 40)
    errors = []
    for rank in (0, 2, 8):
        split = split_low_rank(W, H, rank=rank)
        E = W - split.scale * split.signs - split.low_rank_out @ split.low_rank_in
        errors.append(hessian_error(E, H))
        assert split.low_rank_out.shape == (48, rank)
        assert split.low_rank_in.shape == (rank, 40)
        assert errors[-1] == pytest.approx(min(split.losses), rel=1e-4)  # float32
    assert errors[2] < 0.9 * errors[1] < 0.9 * errors[0]


@given(m=st.integers(8, 48), n=st.integers(8, 48), rank=st.integers(1, 8), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=10)
def test_at_convergence_a_pair_is_no_worse_than_none(m: int, n: int, rank: int, seed: int) -> None:
    W, H = problem(m, n, seed)
    assert min(split_low_rank(W, H, rank=rank).losses) <= min(split_low_rank(W, H, rank=0).losses)


def test_rank_zero_is_descent() -> None:
    W, H = problem(12, 16)
    split = split_low_rank(W, H, rank=0)
    signs, scale = descend_signs(W, H)
    assert torch.equal(split.signs, signs)
    assert torch.equal(split.scale, scale)


def test_a_planted_pair_is_found() -> None:
    _, H = problem(1, 32)
    generator = torch.Generator().manual_seed(3)
    B = torch.randint(0, 2, (64, 32), generator=generator).float() * 2 - 1
    pair = torch.randn(64, 2, generator=generator) @ torch.randn(2, 32, generator=generator) * 4
    W = 0.05 * B + pair
    split = split_low_rank(W, H, rank=2, iterations=8)
    alone = split_low_rank(W, H, rank=0)
    assert min(split.losses) < 2e-3 * min(alone.losses)


def test_whitened_svd_beats_the_plain_one() -> None:
    W, H = problem(30, 30)
    C = torch.linalg.cholesky(H)
    U, V = psp._rounded_pair(W, C, rank=4)
    plain_U, s, plain_V = torch.linalg.svd(W, full_matrices=False)
    plain = (plain_U[:, :4] * s[:4]) @ plain_V[:4]
    assert hessian_error(W - U @ V, H) < hessian_error(W - plain, H)


def test_randomised_svd_comes_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    W, _ = problem(90, 80)
    U, s, Vh = psp._truncated_svd(W, rank=6)
    exact = float((W - (U * s) @ Vh).square().sum())
    monkeypatch.setattr(psp, "EXACT_SVD", 0)
    U, s, Vh = psp._truncated_svd(W, rank=6)
    # a flat spectrum is the worst case; power iterations bring the sketch within a percent
    assert float((W - (U * s) @ Vh).square().sum()) < 1.01 * exact


def test_rank_above_the_size_is_cut() -> None:
    W, H = problem(3, 5)
    split = split_low_rank(W, H, rank=9)
    assert split.low_rank_out.shape == (3, 3)

"""OKT: Q^T Q = I, a falling loss, a planted optimum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics import okt
from bwla_compiler.numerics.kronecker import apply_kronecker, haar
from bwla_compiler.numerics.okt import fit_okt


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(*, rows: int = 64, angle: float, seed: int = 0) -> torch.Tensor:
    """Return alpha * B Q^T in float64, Q = Q1 (x) Q2 a rotation by a small random angle from the identity."""
    signs = torch.randint(0, 2, (rows, 12), generator=generator(seed)).double() * 2 - 1
    alpha = torch.rand(rows, 1, generator=generator(seed + 1), dtype=torch.float64) + 0.5
    factors = []
    for n in (3, 4):
        A = angle * torch.randn(n, n, generator=generator(seed + n), dtype=torch.float64)
        factors.append(torch.matrix_exp(A - A.mT))
    return alpha * apply_kronecker(signs, factors[0].mT.contiguous(), factors[1].mT.contiguous())


@given(
    m=st.integers(1, 40), n1=st.integers(1, 6), n2=st.integers(1, 9), start=st.sampled_from(["hadamard", "identity"])
)
@settings(deadline=None, max_examples=25)
def test_factors_are_orthogonal_and_hard_losses_fall(m: int, n1: int, n2: int, start: str) -> None:
    W = torch.randn(m, n1 * n2, generator=generator(m))
    fit = fit_okt(W, n1=n1, n2=n2, iterations=8, start=start, generator=generator())  # type: ignore[arg-type]
    for factor, n in ((fit.left, n1), (fit.right, n2)):
        assert factor is not None
        # each entry is rounded once, to 2^-25 of at most 1, from a float64 polar factor
        torch.testing.assert_close(factor.mT @ factor, torch.eye(n), atol=1e-6, rtol=0)
    assert len(fit.losses) == 9
    # float32: the loss is a difference of sums near 1
    assert all(b <= a + 1e-5 for a, b in zip(fit.losses, fit.losses[1:], strict=False))


def test_recovers_a_planted_rotation_from_a_start_near_it() -> None:
    W = planted(angle=0.15)
    fit = fit_okt(W, n1=3, n2=4, iterations=60, start="identity", generator=generator())
    assert fit.losses[0] > 0.05
    assert fit.losses[-1] < 1e-10  # linear convergence in float64: exact up to rounding


def test_one_factor_alone_recovers_its_part() -> None:
    W = apply_kronecker(planted(angle=0.0), None, haar(4, generator=generator(5)))
    fit = fit_okt(W, n1=3, n2=4, iterations=10, generator=generator(), fit_left=False)
    assert fit.left is None
    assert fit.right is not None
    assert fit.losses[-1] < fit.losses[0]
    kept = fit_okt(W, n1=3, n2=4, generator=generator(), fit_left=False, fit_right=False)
    assert kept.left is None
    assert kept.right is None
    assert len(kept.losses) == 1


def test_losses_are_those_of_the_returned_factors() -> None:
    W = torch.randn(30, 12, generator=generator(), dtype=torch.float64)
    fit = fit_okt(W, n1=3, n2=4, iterations=5, generator=generator())
    rotated = apply_kronecker(W, fit.left, fit.right)
    alpha = rotated.abs().mean(1, keepdim=True)
    direct = (rotated - alpha * rotated.sign()).square().sum() / W.square().sum()
    assert fit.losses[-1] == pytest.approx(float(direct), abs=1e-12)


@pytest.mark.parametrize("soft", [False, True])
def test_a_factor_of_a_real_size_is_orthogonal_to_one_part_in_a_million(soft: bool) -> None:
    W = torch.randn(96, 24 * 32, generator=generator())
    fit = fit_okt(W, n1=24, n2=32, iterations=3, soft=soft, generator=generator())
    assert fit.left is not None
    assert fit.right is not None
    Q = torch.kron(fit.left, fit.right)
    # float32: both factors and their product are rounded, 2^-24 each of entries that are mostly below 0.3
    assert float((Q.mT.double() @ Q.double() - torch.eye(768)).abs().max()) < 1e-6


@given(
    m=st.integers(1, 30), n1=st.integers(1, 5), n2=st.integers(1, 8), start=st.sampled_from(["hadamard", "identity"])
)
@settings(deadline=None, max_examples=25)
def test_the_likelihood_of_soft_em_never_falls(m: int, n1: int, n2: int, start: str) -> None:
    W = torch.randn(m, n1 * n2, generator=generator(m), dtype=torch.float64)
    W *= torch.logspace(-2, 2, m, dtype=torch.float64)[:, None]  # rows of very different sizes count by their fit
    fit = fit_okt(W, n1=n1, n2=n2, iterations=8, soft=True, start=start, generator=generator())  # type: ignore[arg-type]
    assert len(fit.likelihoods) == 8
    # float64 sums of terms up to 10
    assert all(b >= a - 1e-9 for a, b in zip(fit.likelihoods, fit.likelihoods[1:], strict=False))


def test_the_likelihood_is_that_of_two_gaussians() -> None:
    W = planted(angle=0.3)
    fit = fit_okt(W, n1=3, n2=4, iterations=1, soft=True, fit_right=False, start="identity", generator=generator())
    assert fit.likelihoods[0] < 5
    mixture = okt._fit_mixture(W, None)
    near, far = ((W - sign * mixture.alpha).square() / (2 * mixture.variance) for sign in (1, -1))
    direct = ((-near).exp() + (-far).exp()).log() - (2 * (2 * torch.pi * mixture.variance).sqrt()).log()
    assert fit.likelihoods[0] == pytest.approx(float(direct.mean()), abs=1e-12)


@pytest.mark.parametrize("rows", [8, 200])
def test_soft_lowers_the_loss_and_does_not_collapse(rows: int) -> None:
    W = planted(rows=rows, angle=0.15)
    fit = fit_okt(W, n1=3, n2=4, iterations=60, soft=True, start="identity", generator=generator())
    assert fit.losses[-1] < 0.1 * fit.losses[0]
    assert fit.left is not None
    assert fit.left.isfinite().all()


def test_zero_rows_and_zero_weight_stay_finite() -> None:
    W = torch.randn(6, 12, generator=generator())
    W[2] = 0
    for weight in (W, torch.zeros(4, 12)):
        for soft in (False, True):
            fit = fit_okt(weight, n1=3, n2=4, iterations=3, soft=soft, generator=generator())
            assert fit.left is not None
            assert fit.left.isfinite().all()


def test_refuses_a_size_that_does_not_factor() -> None:
    with pytest.raises(ShapeError, match="3 \\* 5"):
        fit_okt(torch.zeros(4, 12), n1=3, n2=5, generator=generator())


def test_reports_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    fit_okt(torch.ones(2, 4), n1=2, n2=2, iterations=2, generator=generator(), progress=lambda *a: seen.append(a))
    assert seen == [("okt", 1, 2), ("okt", 2, 2)]

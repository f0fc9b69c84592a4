"""Orthogonal matrices and their Kronecker products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.kronecker import apply_kronecker, factor_pair, haar, hadamard

# products of n float64 terms of size 1/n, and QR: rounding stays near 1e-15 * sqrt(n)
ORTHOGONAL = 1e-12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def defect(Q: torch.Tensor) -> float:
    return float((Q.mT @ Q - torch.eye(Q.shape[0], dtype=Q.dtype)).abs().max())


@pytest.mark.parametrize(("n", "pair"), [(1, (1, 1)), (17, (1, 17)), (768, (24, 32)), (5120, (64, 80)), (64, (8, 8))])
def test_factor_pair_is_the_most_square(n: int, pair: tuple[int, int]) -> None:
    assert factor_pair(n) == pair


def test_factor_pair_refuses_no_channels() -> None:
    with pytest.raises(ShapeError):
        factor_pair(0)


@pytest.mark.parametrize(("left", "right"), [(True, True), (True, False), (False, True)])
def test_apply_equals_the_dense_product(left: bool, right: bool) -> None:
    X = torch.randn(2, 3, 12, generator=generator(), dtype=torch.float64)
    Q1 = haar(3, generator=generator(1)) if left else None
    Q2 = haar(4, generator=generator(2)) if right else None
    eye = torch.eye(12, dtype=torch.float64)
    dense = torch.kron(Q1 if left else eye[:3, :3], Q2 if right else eye[:4, :4])
    torch.testing.assert_close(apply_kronecker(X, Q1, Q2), X @ dense)


def test_apply_keeps_dtype_and_identity() -> None:
    X = torch.randn(5, 12, generator=generator()).bfloat16()
    assert apply_kronecker(X, None, None) is X
    assert apply_kronecker(X, haar(3, generator=generator()), None).dtype == torch.bfloat16


def test_apply_refuses_wrong_sizes() -> None:
    X = torch.zeros(2, 12)
    with pytest.raises(ShapeError, match="12 channels"):
        apply_kronecker(X, torch.eye(3), torch.eye(5))
    with pytest.raises(ShapeError, match="12 channels"):
        apply_kronecker(X, torch.eye(5), None)
    with pytest.raises(ShapeError, match="square"):
        apply_kronecker(X, torch.zeros(3, 2), None)


@given(n=st.integers(1, 40), fixes_ones=st.booleans(), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_haar_is_orthogonal(n: int, fixes_ones: bool, seed: int) -> None:
    Q = haar(n, generator=generator(seed), fixes_ones=fixes_ones)
    assert Q.shape == (n, n)
    assert defect(Q) < ORTHOGONAL
    if fixes_ones:
        assert float((Q.sum(1) - 1).abs().max()) < ORTHOGONAL


def test_haar_has_the_moments_of_the_uniform_law() -> None:
    draws = torch.stack([haar(3, generator=generator(seed)) for seed in range(2000)])
    # E Q_ij = 0, E Q_ij^2 = 1/3; standard errors sqrt(1/3/2000) = 0.013 and about 0.007: five of them
    assert float(draws.mean(0).abs().max()) < 0.065
    assert float((draws.square().mean(0) - 1 / 3).abs().max()) < 0.035


SIZES = [*range(1, 29), 36, 40, 56, 64, 84, 96, 100, 152, 200, 256, 768, 1024]


@pytest.mark.parametrize("fixes_ones", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_hadamard_is_orthogonal(n: int, fixes_ones: bool) -> None:
    Q = hadamard(n, generator=generator(n), fixes_ones=fixes_ones)
    assert Q.shape == (n, n)
    assert defect(Q) < ORTHOGONAL
    if fixes_ones:
        assert float((Q.sum(1) - 1).abs().max()) < ORTHOGONAL
        assert float((Q.sum(0) - 1).abs().max()) < ORTHOGONAL


@pytest.mark.parametrize("n", [1, 2, 12, 20, 28, 36, 96, 200, 256, 768, 2560])
def test_hadamard_is_flat_where_a_matrix_is_known(n: int) -> None:
    Q = hadamard(n, generator=generator())
    torch.testing.assert_close(Q.abs(), torch.full_like(Q, n**-0.5))  # float64 rounding of 1 / sqrt(n)


@pytest.mark.parametrize("n", [2560, 3072, 5120])
def test_large_hadamard_keeps_lengths(n: int) -> None:
    Q = hadamard(n, generator=generator(), dtype=torch.float32)
    x = torch.randn(8, n, generator=generator())
    back = x @ Q @ Q.mT
    # two products of n float32 terms; a full Q^T Q would take a minute
    torch.testing.assert_close(back, x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [96, 256, 768])
def test_hadamard_that_fixes_ones_still_spreads_an_outlier(n: int) -> None:
    Q = hadamard(n, generator=generator(), fixes_ones=True)
    # entries are near Gaussian of variance 1/n: 6.5 deviations are beyond n^2 = 6e5 draws
    assert float(Q.abs().max()) < 6.5 * n**-0.5


def test_signs_depend_on_the_generator_alone() -> None:
    assert torch.equal(hadamard(24, generator=generator(3)), hadamard(24, generator=generator(3)))
    assert not torch.equal(hadamard(24, generator=generator(3)), hadamard(24, generator=generator(4)))

"""Group scales: rounding, descent that never rises, and the row scale's case."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.group_signs import descend_groups, round_groups
from bwla_compiler.numerics.psp import hessian_error
from bwla_compiler.numerics.signs import descend_signs


def problem(m: int, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * n, n, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    H = X.mT @ X / (3 * n)
    H.diagonal().add_(0.05 * H.diagonal().mean())
    return torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype), H.to(dtype)


def dense(signs: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    return scale.repeat_interleave(group, 1)[:, : signs.shape[1]] * signs


def test_rounding_takes_the_mean_magnitude_of_each_group() -> None:
    W = torch.tensor([[1.0, -3.0, 0.0, 5.0, -2.0]])
    signs, scale = round_groups(W, group=2)
    assert signs.tolist() == [[1, -1, 1, 1, -1]]
    assert scale.tolist() == [[2.0, 2.5, 2.0]]


@given(m=st.integers(1, 6), n=st.integers(1, 40), group=st.sampled_from([3, 8, 16]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_the_objective_never_rises(m: int, n: int, group: int, seed: int) -> None:
    W, H = problem(m, n, seed=seed)
    losses = []
    for sweeps in range(4):
        signs, scale = descend_groups(W, H, group=group, sweeps=sweeps)
        assert (scale >= 0).all()
        losses.append(hessian_error(W - dense(signs, scale, group), H))
    # the scales' ridge of 1e-6 may cost that share of the objective
    assert all(b <= a * (1 + 1e-5) + 1e-12 for a, b in pairwise(losses))


def test_one_group_is_the_descent_with_row_scales() -> None:
    W, H = problem(8, 24)
    signs, scale = descend_groups(W, H, group=24, sweeps=6)
    expected_signs, expected_scale = descend_signs(W, H, sweeps=6)
    assert torch.equal(signs, expected_signs)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)  # the ridge


def test_groups_find_the_scales_of_a_weight_that_has_them() -> None:
    _, H = problem(1, 32)
    generator = torch.Generator().manual_seed(3)
    truth = torch.randint(0, 2, (5, 32), generator=generator).to(torch.int8) * 2 - 1
    scale = torch.rand(5, 4, generator=generator, dtype=torch.float64) + 0.5
    W = dense(truth, scale, 8)
    found, found_scale = descend_groups(W, H, group=8, signs=truth, sweeps=2)
    assert torch.equal(found, truth)
    torch.testing.assert_close(found_scale, scale, rtol=1e-4, atol=0)  # the ridge


def test_groups_fit_better_than_rows_and_keep_float32() -> None:
    W, H = problem(16, 64, dtype=torch.float32)
    W = W * torch.linspace(0.2, 3, 64)  # groups of different size
    signs, scale = descend_groups(W, H, group=16)
    assert signs.dtype == torch.int8
    assert scale.dtype == torch.float32
    rows, row_scale = descend_signs(W, H)
    assert hessian_error(W - dense(signs, scale, 16), H) < hessian_error(W - row_scale * rows, H)


def test_a_wrong_hessian_is_refused() -> None:
    with pytest.raises(ShapeError):
        descend_groups(torch.ones(2, 3), torch.eye(4), group=2)

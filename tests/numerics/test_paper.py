"""The paper's reading: row and column scales have their optimum, the split lowers the error, the pair holds means."""

from itertools import pairwise

import pytest
import torch

from bwla_compiler.numerics.paper import split_as_paper
from bwla_compiler.numerics.row_column import round_rows_columns


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rows_and_columns_recover_a_rank_one_magnitude() -> None:
    row, column = gaussian(7, 1).abs() + 0.1, gaussian(1, 9, seed=1).abs() + 0.1
    W = row * column * torch.where(gaussian(7, 9, seed=2) < 0, -1.0, 1.0)
    signs, found_row, found_column = round_rows_columns(W)
    torch.testing.assert_close(found_row * found_column * signs, W)


def test_refinements_never_raise_the_error() -> None:
    W = gaussian(12, 30) * torch.linspace(0.1, 4, 30)
    errors = []
    for refinements in (0, 1, 2, 5, 15):
        signs, row, column = round_rows_columns(W, refinements=refinements)
        errors.append(float((W - row * column * signs).square().sum()))
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))  # rounding of float64
    assert errors[-1] < 0.9 * errors[0]


def test_dead_columns_get_scale_zero() -> None:
    W = gaussian(4, 6)
    W[:, 2] = 0
    _, row, column = round_rows_columns(W)
    assert column[2] == 0
    assert row.isfinite().all()
    assert all(part.isfinite().all() for part in round_rows_columns(torch.zeros(3, 4))[1:])


def test_the_split_falls_and_holds_the_row_means() -> None:
    W = gaussian(20, 48) + gaussian(20, 3, seed=1) @ gaussian(3, 48, seed=2) + 2
    generator = torch.Generator().manual_seed(0)
    found = split_as_paper(W, rank=3, generator=generator)
    assert found.low_rank_out.shape == (20, 4)
    assert torch.equal(found.low_rank_in[-1], torch.ones(48, dtype=torch.float64))
    assert found.losses[-1] < 0.7 * found.losses[0]
    dense = found.row_scale * found.column_scale * found.signs + found.low_rank_out @ found.low_rank_in
    assert abs(float((W - dense).square().sum() / W.square().sum()) - found.losses[-1]) < 1e-9  # float64


@pytest.mark.parametrize("W", [torch.zeros(8, 16), torch.ones(8, 16), torch.ones(8, 1), torch.full((8, 16), 1e-30)])
def test_weights_without_a_residual_have_a_finite_split(W: torch.Tensor) -> None:
    found = split_as_paper(W, rank=2, generator=torch.Generator().manual_seed(0))
    dense = found.row_scale * found.column_scale * found.signs + found.low_rank_out @ found.low_rank_in
    torch.testing.assert_close(dense, W)


def test_rank_zero_centres_and_scales_alone() -> None:
    W = gaussian(5, 16) + 3
    found = split_as_paper(W, rank=0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.low_rank_out[:, 0], W.mean(1))
    assert found.losses == ()

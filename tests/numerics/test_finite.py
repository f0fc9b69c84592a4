"""A tensor is finite where each of its numbers is, wherever the one that is not stands."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.numerics.finite import all_finite


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(width=32), min_size=0, max_size=70), st.sampled_from([torch.float32, torch.float64]))
def test_it_is_what_isfinite_says(values: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(values, dtype=dtype)
    assert all_finite(x) is bool(torch.isfinite(x).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1234, 4095])
def test_one_among_many_is_seen(bad: float, place: int) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert all_finite(x)
    x.view(-1)[place] = bad
    assert not all_finite(x)
    assert not all_finite(x.T)

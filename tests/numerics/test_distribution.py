"""Spreads: known distributions give their known coefficients; outliers show in the tails."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.distribution import bimodality, tails, weight_spread
from bwla_compiler.numerics.spread import BINS, CHANNELS

GENERATOR = torch.Generator().manual_seed(0)
NORMAL = torch.randn(256, 512, generator=GENERATOR)


def test_bimodality_of_known_distributions() -> None:
    # 131072 samples: the fourth moment's standard error is 1% of it
    assert bimodality(NORMAL) == pytest.approx(1 / 3, rel=0.02)
    assert bimodality(torch.rand(256, 512, generator=GENERATOR)) == pytest.approx(5 / 9, rel=0.02)
    assert bimodality(NORMAL.sign()) == pytest.approx(1.0, abs=1e-4)  # signs are not quite half and half
    assert bimodality(torch.ones(3, 4)) == 1 / 3


def test_rows_are_measured_in_their_own_units() -> None:
    scaled = NORMAL * torch.logspace(-3, 3, 256)[:, None]
    assert weight_spread(scaled).bimodality == pytest.approx(weight_spread(NORMAL).bimodality, rel=1e-3)
    counts = weight_spread(NORMAL.sign()).counts
    assert len(counts) == BINS
    assert sorted(counts)[:-2] == [0] * (BINS - 2)


def test_experts_are_sampled_and_nothing_is_refused() -> None:
    assert sum(weight_spread(torch.ones(4, 3, 5)).counts) == 60
    assert sum(weight_spread(torch.zeros(2, 2)).counts) == 4
    with pytest.raises(ShapeError, match="no spread"):
        weight_spread(torch.zeros(0, 4))


def test_an_outlier_channel_shows_in_every_tail() -> None:
    outlier = NORMAL.clone()
    outlier[:, 7] *= 100
    plain, found = tails(NORMAL, bits=6), tails(outlier, bits=6)
    assert plain.kurtosis == pytest.approx(3.0, rel=0.03)
    assert found.kurtosis > 50
    assert found.peak > 3 * plain.peak
    assert found.zeroed > 0.5 > plain.zeroed
    assert found.lost > plain.lost / 10  # energy of the outlier hides the loss: the other measures show it
    assert len(found.channels) == CHANNELS
    assert found.channels.index(max(found.channels)) == 0


def test_sixteen_bits_lose_nothing_and_zeros_are_taken() -> None:
    found = tails(NORMAL[:4], bits=16)
    assert (found.lost, found.zeroed) == (0.0, 0.0)
    assert tails(torch.zeros(3, 5), bits=6).channels == (0.0,) * 5


@given(st.integers(1, 700), st.integers(1, 70))
@settings(deadline=None, max_examples=25)
def test_any_shape_has_tails(n_tokens: int, channels: int) -> None:
    x = torch.randn(n_tokens, channels, generator=torch.Generator().manual_seed(n_tokens))
    found = tails(x, bits=6)
    assert len(found.channels) == min(CHANNELS, channels)
    assert found.peak <= channels**0.5 + 1e-3  # max / rms: at most one channel has all the energy

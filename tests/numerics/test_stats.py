"""Sums over tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.errors import CalibrationError, ShapeError
from bwla_compiler.numerics import stats as stats_module
from bwla_compiler.numerics.stats import LinearStats, damped


def tokens(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 5, generator=generator), torch.randn(count, 3, generator=generator)


@given(cut=st.integers(0, 40), chunk=st.integers(1, 50))
@settings(deadline=None, max_examples=25)
def test_merged_parts_equal_the_whole_and_the_definition(cut: int, chunk: int) -> None:
    x, drift = tokens()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats_module, "CHUNK_TOKENS", chunk)
        parts = [LinearStats.empty(5, 3), LinearStats.empty(5, 3)]
        parts[0].update(x[:cut], drift[:cut])
        parts[1].update(x[cut:], drift[cut:])
    merged = parts[0].merge(parts[1])
    assert merged is parts[0]
    assert merged.n_tokens == 40
    whole = LinearStats.empty(5, 3)
    whole.update(x, drift)
    # float32 rounding within a chunk
    torch.testing.assert_close(merged.gram(), whole.gram(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.gram(), (x.double().mT @ x.double()) / 40, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.cross(), (drift.double().mT @ x.double()) / 40, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged.x_absmax, x.abs().amax(0))


def test_gram_alone() -> None:
    stats = LinearStats.empty(5)
    stats.update(tokens()[0].bfloat16())
    assert stats.gram().dtype == torch.float64
    with pytest.raises(CalibrationError, match="no drift"):
        stats.cross()


def test_refusals() -> None:
    x, drift = tokens()
    stats = LinearStats.empty(5, 3)
    with pytest.raises(CalibrationError, match="no calibration token"):
        stats.gram()
    with pytest.raises(ShapeError, match="every update"):
        stats.update(x)
    with pytest.raises(ShapeError, match=r"expected \[tokens, 5\]"):
        stats.update(x[:, :4], drift)
    with pytest.raises(ShapeError, match=r"expected \[40, 3\]"):
        stats.update(x, drift[:, :2])
    with pytest.raises(CalibrationError, match="activations hold NaN"):
        stats.update(x / 0, drift)
    with pytest.raises(ShapeError, match="merged"):
        stats.merge(LinearStats.empty(5))
    assert stats.n_tokens == 0


def test_damping_and_dead_columns() -> None:
    gram = torch.diag(torch.tensor([2.0, 0.0, 4.0]))
    kept = gram.clone()
    H = damped(gram, 0.5)
    assert torch.equal(gram, kept)
    assert H.diagonal().tolist() == [3.0, 3.0, 5.0]
    assert torch.equal(damped(torch.zeros(2, 2), 0.5), 1.5 * torch.eye(2))

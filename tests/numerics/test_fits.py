"""Smoothing and the drift-corrected target."""

import pytest
import torch

from bwla_compiler.errors import CalibrationError, ShapeError
from bwla_compiler.numerics.smoothing import smoothing_scale
from bwla_compiler.numerics.target import drift_corrected


def test_smoothing_at_half_evens_out_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    x_max, w_max = torch.rand(9, generator=generator) + 0.1, torch.rand(9, generator=generator) + 0.1
    s = smoothing_scale(x_max, w_max, exponent=0.5)
    assert float(s.log().mean()) == pytest.approx(0, abs=1e-6)  # float32
    ratio = (x_max / s) / (w_max * s)
    torch.testing.assert_close(ratio, ratio[:1].expand(9))


def test_smoothing_follows_the_formula() -> None:
    x_max, w_max = torch.tensor([1.0, 16.0]), torch.tensor([1.0, 1.0])
    s = smoothing_scale(x_max, w_max, exponent=0.25)
    torch.testing.assert_close(s[1] / s[0], torch.tensor(2.0))
    s = smoothing_scale(w_max, x_max, exponent=0.25)
    torch.testing.assert_close(s[0] / s[1], torch.tensor(8.0))


def test_smoothing_is_off_at_zero_and_finite_on_dead_channels() -> None:
    dead, live = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0])
    assert torch.equal(smoothing_scale(dead, live, exponent=0), torch.ones(3))
    for x_max in (dead, torch.zeros(3)):
        s = smoothing_scale(x_max, live, exponent=0.5)
        assert s.isfinite().all()
        assert (s > 0).all()


def test_smoothing_refuses_different_sizes() -> None:
    with pytest.raises(ShapeError):
        smoothing_scale(torch.ones(3), torch.ones(4), exponent=0.5)


def drift_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return W and streams Xf, Xq = Xf M with M invertible, so that the fp output is linear in Xq."""
    generator = torch.Generator().manual_seed(1)
    Xf = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    M = torch.eye(6, dtype=torch.float64) + 0.2 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return torch.randn(4, 6, generator=generator, dtype=torch.float64), Xf, Xf @ M


def test_target_recovers_the_least_squares_solution() -> None:
    W, Xf, Xq = drift_problem()
    T = (Xf - Xq) @ W.mT
    found = drift_corrected(W, Xq.mT @ Xq / 200, T.mT @ Xq / 200, damping=0)
    expected = torch.linalg.lstsq(Xq, Xf @ W.mT).solution.mT
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(Xq @ found.mT, Xf @ W.mT)


def test_damping_pulls_towards_the_weight() -> None:
    W, Xf, Xq = drift_problem()
    gram, cross = Xq.mT @ Xq / 200, ((Xf - Xq) @ W.mT).mT @ Xq / 200
    moves = [float((drift_corrected(W, gram, cross, damping=d) - W).norm()) for d in (0.0, 0.1, 1.0, 1e6)]
    assert moves[0] > moves[1] > moves[2] > moves[3]
    assert moves[3] < 1e-5 * moves[0]


def test_target_keeps_dtype_and_refuses_bad_input() -> None:
    W, _, Xq = drift_problem()
    gram = Xq.mT @ Xq / 200
    assert drift_corrected(W.float(), gram, torch.zeros(4, 6), damping=0.03).dtype == torch.float32
    with pytest.raises(ShapeError, match="cross moment"):
        drift_corrected(W, gram, torch.zeros(6, 4), damping=0.03)
    with pytest.raises(CalibrationError, match="raise the damping"):
        drift_corrected(W, torch.zeros(6, 6), torch.zeros(4, 6), damping=0.03)

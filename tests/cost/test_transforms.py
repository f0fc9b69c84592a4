"""Sizes of factors, and what a budget affords."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.cost.devices import DEVICES, Device
from bwla_compiler.cost.factors import hadamard_factors, holds, kronecker_factors
from bwla_compiler.cost.transforms import choose_transform, transform_share
from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.kronecker import factor_pair
from bwla_compiler.spec import LinearSpec, TransformSpec


@pytest.mark.parametrize(
    "n, pair",
    [
        (25600, (128, 200)),  # Qwen3-32B: 160 x 160 spills
        (27648, (128, 216)),
        (29568, (128, 231)),
        (28672, (128, 224)),
        (14336, (112, 128)),
        (5120, (64, 80)),
        (53248, (208, 256)),  # no pair is held
        (7, (1, 7)),
        (1, (1, 1)),
    ],
)
def test_known_sizes(n: int, pair: tuple[int, int]) -> None:
    assert kronecker_factors(n) == pair


@given(st.integers(1, 40_000))
@settings(deadline=None, max_examples=200)
def test_factors_are_the_most_square_that_are_held(n: int) -> None:
    n1, n2 = kronecker_factors(n)
    assert n1 * n2 == n
    if holds(*factor_pair(n)):
        assert (n1, n2) == factor_pair(n)
    held = [d + n // d for d in range(1, n + 1) if n % d == 0 and holds(d, n // d)]
    if held and min(held) <= 2 * sum(factor_pair(n)):
        assert holds(n1, n2)
        assert n1 + n2 == min(held)


def test_no_channels_are_refused() -> None:
    with pytest.raises(ShapeError, match="at least 1"):
        kronecker_factors(0)


WIDE = LinearSpec(25600, (5120,), transform=TransformSpec("kronecker", 128, 200, True, True, True))


def test_a_share_by_hand() -> None:
    h100 = DEVICES["h100-sxm"]
    turning = 25600 * (2 * 128 + 2 * 200 + 1) * 132 / 989.5e12
    rounding, product = (25600 * 3 / 3.35e12, (5120 * 3200 + 2 * 5120 + 1 + 25600 + 2 * 5120) / 3.35e12)
    expected = 1 - (rounding + product) / (turning + product)
    assert transform_share(WIDE, device=h100) == pytest.approx(expected)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_a_budget_takes_kronecker_then_hadamard_then_none(device: Device) -> None:
    full = transform_share(WIDE, device=device)
    kept = choose_transform(WIDE, budget=full, device=device)
    assert (kept.transform, kept.reason) == (WIDE.transform, "")
    less = choose_transform(WIDE, budget=0.7 * full, device=device)
    assert less.share <= 0.7 * full
    assert (less.transform.kind, less.transform.left, less.transform.right) == ("hadamard", False, True)
    assert less.transform.n1 * less.transform.n2 == 25600
    assert "128 x 200 kronecker takes" in less.reason
    none = choose_transform(WIDE, budget=0.0, device=device)
    assert not none.transform.online
    assert "more than the budget of 0%" in none.reason


def test_a_whole_budget_affords_everything() -> None:
    tiny = LinearSpec(16, (1,), transform=TransformSpec("kronecker", 4, 4, True, True))
    assert choose_transform(tiny, budget=1.0, device=DEVICES["mi300x"]).transform == tiny.transform


def test_the_factor_across_heads_is_kept_or_left_out() -> None:
    partial = LinearSpec(8192, (5120,), transform=TransformSpec("kronecker", 64, 128, left=True))
    choice = choose_transform(partial, budget=0.001, device=DEVICES["h100-sxm"])
    assert not choice.transform.online  # a factor within heads is folded already: blocks would add nothing


@pytest.mark.parametrize(
    "n, pair",
    [
        (3072, (12, 256)),
        (12288, (24, 512)),
        (25600, (50, 512)),
        (11008, (43, 256)),
        (96, (3, 32)),
        (53248, (52, 1024)),  # no pair is held
        (9, None),
        (2, None),
        (1, None),
    ],
)
def test_known_sizes_beside_a_hadamard_matrix(n: int, pair: tuple[int, int] | None) -> None:
    assert hadamard_factors(n) == pair


@given(st.integers(1, 40_000))
@settings(deadline=None, max_examples=200)
def test_a_hadamard_factor_is_a_power_of_two_that_saves_operations(n: int) -> None:
    pair = hadamard_factors(n)
    if pair is not None:
        n1, n2 = pair
        assert n1 * n2 == n
        assert n2 & (n2 - 1) == 0
        assert n1 + n2.bit_length() < sum(kronecker_factors(n))
        assert holds(n1, n2) or not holds(*kronecker_factors(n))

"""Rounding of activations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.numerics.activations import fake_quantize, quantize_activation


@given(bits=st.integers(2, 8), n=st.integers(1, 40), exponent=st.integers(-30, 30), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_codes_are_in_range_and_within_half_a_step(bits: int, n: int, exponent: int, seed: int) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    codes, scale = quantize_activation(x, bits=bits)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (3, 1)
    assert (codes.abs().amax(-1) == 2 ** (bits - 1) - 1).all()
    # half a step, and float32 rounding of the quotient
    assert ((codes * scale - x).abs() <= 0.5001 * scale).all()


def test_halves_go_to_even() -> None:
    codes, scale = quantize_activation(torch.tensor([[31.0, 0.5, 1.5, -2.5, -3.5]]), bits=6)
    assert float(scale) == 1
    assert codes.tolist() == [[31, 0, 2, -2, -4]]


def test_zero_and_vanishing_rows() -> None:
    codes, scale = quantize_activation(torch.tensor([[0.0, 0.0], [1e-45, -1e-45]]), bits=6)
    assert not codes.any()
    assert scale.tolist() == [[1.0], [1.0]]


def test_fake_quantize_keeps_dtype_and_is_off_at_16_bits() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert fake_quantize(x, bits=16) is x
    y = fake_quantize(x, bits=6)
    assert y.dtype == torch.bfloat16
    assert y.shape == x.shape
    assert not torch.equal(x, y)
    # bf16 keeps 8 bits: the largest value of a row comes back within half a unit in the last place
    torch.testing.assert_close(y.abs().amax(-1), x.abs().amax(-1), rtol=2**-8, atol=0)


def test_other_bits_are_refused() -> None:
    with pytest.raises(AssertionError, match="9 bits"):
        quantize_activation(torch.ones(2), bits=9)

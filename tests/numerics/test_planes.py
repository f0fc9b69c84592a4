"""Bits of signs, binary weights, half-precision bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.errors import ShapeError, WeightError
from bwla_compiler.numerics.half import from_half_bits, to_half_bits
from bwla_compiler.numerics.planes import BinaryWeight, pack_signs, unpack_signs


def random_signs(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1


@given(n=st.integers(1, 70), rows=st.integers(1, 4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_packing_round_trip(n: int, rows: int, seed: int) -> None:
    signs = random_signs(2, rows, n, seed=seed)
    packed = pack_signs(signs)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, rows, (n + 7) // 8)
    unpacked = unpack_signs(packed, n)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, signs)


def test_bit_order_and_padding() -> None:
    signs = torch.tensor([1, -1, -1, -1, -1, -1, -1, 1, -1, 1], dtype=torch.int8)
    assert pack_signs(signs).tolist() == [0b10000001, 0b00000010]
    with pytest.raises(ShapeError, match="2 are needed"):
        unpack_signs(torch.zeros(3, dtype=torch.uint8), 10)


def test_dense_of_all_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    signs, scale = random_signs(2, 3, 10), torch.rand(2, 3, 3, generator=generator)
    column, U, V = (torch.rand(*s, generator=generator) for s in ((10,), (3, 2), (2, 10)))
    weight = BinaryWeight(signs, scale, column, U, V, group_size=4)
    assert (weight.planes, weight.out_features, weight.in_features, weight.rank) == (2, 3, 10, 2)
    expected = torch.zeros(3, 10)
    for p in range(2):
        for j in range(10):
            expected[:, j] += scale[p, :, j // 4] * signs[p, :, j] * column[j]
    torch.testing.assert_close(weight.dense(), expected + U @ V)


def test_dense_of_one_row_scale() -> None:
    signs, scale = random_signs(1, 4, 7), torch.full((1, 4, 1), 0.5)
    weight = BinaryWeight(signs, scale)
    assert torch.equal(weight.dense(), 0.5 * signs[0])
    assert weight.rank == 0
    assert weight.columns_per_scale() == 7


@pytest.mark.parametrize(
    "fields",
    [
        {"signs": random_signs(4, 7)},
        {"scale": torch.ones(1, 3, 1)},
        {"scale": torch.ones(1, 4, 2), "group_size": 2},
        {"scale": torch.ones(1, 4, 0)},
        {"column_scale": torch.ones(4)},
        {"low_rank_out": torch.ones(4, 2)},
        {"low_rank_out": torch.ones(4, 2), "low_rank_in": torch.ones(3, 7)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(fields: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ShapeError):
        BinaryWeight(**{"signs": random_signs(1, 4, 7), "scale": torch.ones(1, 4, 1), **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"signs": torch.zeros(1, 4, 7, dtype=torch.int8)},
        {"scale": torch.full((1, 4, 1), torch.nan)},
        {"column_scale": torch.full((7,), torch.inf)},
    ],
)
def test_bad_entries_are_refused(fields: dict[str, torch.Tensor]) -> None:
    with pytest.raises(WeightError):
        BinaryWeight(**{"signs": random_signs(1, 4, 7), "scale": torch.ones(1, 4, 1), **fields})


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=0, max_size=20))
@settings(deadline=None, max_examples=100)
def test_half_bits_keep_eleven_bits_over_a_wide_range(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    bits, e = to_half_bits(x)
    assert bits.dtype == torch.int16
    assert bits.shape == x.shape
    back = from_half_bits(bits, e)
    assert back.isfinite().all()
    largest = float(x.abs().max()) if values else 0.0
    # half a unit of an 11-bit significand; below 2^-21 of the largest, half a step of the subnormals;
    # last, the smallest float32
    bound = torch.maximum(x.double().abs() * 2.0**-11, torch.tensor(largest * 2.0**-32)) + 2.0**-149
    assert ((back.double() - x.double()).abs() <= bound).all()


def test_half_bits_of_half_values_are_exact_and_zeros_are_zeros() -> None:
    x = torch.tensor([[1.5, -0.25], [1024.0, 2.0**-9]])
    assert torch.equal(from_half_bits(*to_half_bits(x)), x)
    assert torch.equal(from_half_bits(*to_half_bits(torch.zeros(3))), torch.zeros(3))


def test_half_bits_refuse_infinity() -> None:
    with pytest.raises(WeightError):
        to_half_bits(torch.tensor([1.0, torch.inf]))

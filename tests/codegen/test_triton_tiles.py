"""Tiles: all that are offered can be launched, and the model's order follows the device and the shape."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.codegen.triton_spec import NO_TILE, LinearKernel
from bwla_compiler.codegen.triton_tiles import candidates, device_for, modelled_seconds, ranked, tokens_bucket
from bwla_compiler.cost.devices import DEVICES

H100 = DEVICES["h100-sxm"]
SHARED = 232448


def linear(
    columns: int = 5120, out: int = 5120, *, planes: int = 1, grouped: bool = False, bits: int = 6
) -> LinearKernel:
    return LinearKernel(columns, (out,), planes, grouped, (0,), (False,), (False,), bits, NO_TILE)


@settings(deadline=None, max_examples=80)
@given(
    columns=st.integers(1, 30000),
    planes=st.integers(1, 3),
    grouped=st.booleans(),
    bits=st.sampled_from([4, 8, 16]),
    tokens=st.integers(1, 5000),
)
def test_every_tile_can_be_launched(columns: int, planes: int, grouped: bool, bits: int, tokens: int) -> None:
    spec = linear(columns, planes=planes, grouped=grouped, bits=bits)
    bucket = tokens_bucket(tokens)
    assert tokens <= bucket <= max(8, 2 * tokens)
    found = candidates(spec, bucket)
    assert found
    assert len(set(found)) == len(found)
    for tile in found:
        chosen = dataclasses.replace(spec, tile=tile)
        for number in (tile.rows, max(8, tile.tokens), tile.warps, tile.split):
            assert number & (number - 1) == 0, "Triton's sizes are powers of two"
        step = 16 * tile.rows * planes + (128 if bits < 16 else 512) * tile.tokens
        assert step * tile.stages * tile.split < SHARED
        assert (tile.parts - 1) * chosen.part_groups < max(1, chosen.groups) + tile.parts, "no part stands empty"
        assert modelled_seconds(chosen, bucket, H100) > 0


def test_the_order_is_that_of_the_model() -> None:
    spec = linear()
    seconds = [modelled_seconds(dataclasses.replace(spec, tile=t), 8, H100) for t in ranked(spec, 8, H100)]
    assert seconds == sorted(seconds)


def test_few_rows_of_many_channels_are_shared_and_many_rows_are_not() -> None:
    assert ranked(linear(25600, 5120), 8, H100)[0].parts > 1
    assert ranked(linear(5120, 51200), 8, H100)[0].parts == 1
    assert all(tile.parts == 1 for tile in candidates(linear(25600, 5120), 2048))


@pytest.mark.parametrize("tokens", [1, 8, 128])
def test_a_launch_takes_at_least_as_long_as_its_bytes(tokens: int) -> None:
    spec = linear(5120, 51200)
    best = dataclasses.replace(spec, tile=ranked(spec, tokens, H100)[0])
    assert modelled_seconds(best, tokens, H100) >= 5120 * 51200 / 8 / H100.bytes_per_second


def test_amd_products_are_16_tokens_wide() -> None:
    amd = dataclasses.replace(linear(), decodes=False)
    assert {tile.tokens for tile in candidates(amd, 8, smallest=16)} == {16}
    assert candidates(amd, 1)[0].split == 1, "without a dot product of bytes one token takes the matrix kernel"


@pytest.mark.parametrize(
    "name, device",
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H200", "h200-sxm"),
        ("cuda:80", "a100-sxm"),
        ("cuda:100", "b200-sxm"),
        ("hip:gfx942", "mi300x"),
        ("something new", "h100-sxm"),
    ],
)
def test_devices_by_name(name: str, device: str) -> None:
    assert device_for([name]).name == device

"""The roofline against hand counts."""

import dataclasses

import pytest
import sympy as sp

from bwla_compiler.cost import roofline
from bwla_compiler.cost.devices import DEVICES, Device
from bwla_compiler.cost.roofline import region_cost, symbolic_cost
from bwla_compiler.spec import LinearSpec, TransformSpec

H100 = DEVICES["h100-sxm"]


def test_one_plane_by_hand() -> None:
    cost = region_cost(LinearSpec(1024, (2048, 2048)), tokens=3, device=H100)
    assert cost.bytes == 4096 * 1024 / 8 + 2 * 4096 + 3 * (2 * 1024 + 2 * 4096 + 2 * 1024)
    assert cost.ops == 2 * 3 * 4096 * 1024
    assert cost.seconds == pytest.approx(cost.bytes / 3.35e12)
    assert cost.bound == "memory"


def test_all_parts_by_hand() -> None:
    transform = TransformSpec("kronecker", n1=16, n2=64, left=True, right=True, scaled=True)
    spec = LinearSpec(1024, (512,), planes=2, scale_kind="group", rank=8, transform=transform, bias=True)
    cost = region_cost(spec, tokens=1, device=H100)
    weights = 2 * 512 * (128 + 2 * 8) + 8 * (1024 + 512 + 2)
    extras = 2 * (16**2 + 64**2) + 2 * 1024 + 2 * 512
    assert cost.bytes == weights + extras + 2 * 1024 + 2 * 512 + 2 * 1024
    assert cost.ops == 2 * (2 * 512 * 1024 + 8 * (1024 + 512)) + 1024 * (2 * 16 + 2 * 64 + 1)


def test_a_partial_transform_costs_its_own_factor() -> None:
    def cost(**fields: bool) -> float:
        transform = TransformSpec("kronecker", n1=16, n2=64, **fields)
        return region_cost(LinearSpec(1024, (512,), transform=transform), tokens=1, device=H100).bytes

    assert cost(left=True) - cost() == 2 * 16**2
    assert cost(right=True) - cost() == 2 * 64**2


def test_decode_is_bound_by_memory_and_prefill_by_compute() -> None:
    spec = LinearSpec(4096, (4096,))
    assert region_cost(spec, tokens=1, device=H100).bound == "memory"
    prefill = region_cost(spec, tokens=8192, device=H100)
    assert prefill.bound == "compute"
    assert prefill.seconds == pytest.approx(prefill.ops / H100.int8_ops_per_second)


def test_float_activations_run_at_the_float_peak() -> None:
    spec = LinearSpec(4096, (4096,), activation_bits=16)
    cost = region_cost(spec, tokens=8192, device=H100)
    assert cost.seconds == pytest.approx(cost.ops / H100.bf16_flops)
    rounded = region_cost(dataclasses.replace(spec, activation_bits=8), tokens=8192, device=H100)
    assert rounded.seconds < cost.seconds


def test_expressions_can_be_differentiated_and_agree_with_the_numbers() -> None:
    cost = symbolic_cost()
    slope = sp.diff(cost.bytes, roofline.rank)
    assert sp.simplify(slope - (roofline.n_in + roofline.n_out + 2)) == 0
    a, b = (region_cost(LinearSpec(64, (96,), rank=r), tokens=5, device=H100).bytes for r in (0, 1))
    assert b - a == float(slope.subs({roofline.n_in: 64, roofline.n_out: 96}))


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_devices_are_plausible_and_have_sources(device: Device) -> None:
    assert device.source
    assert device.int8_ops_per_second > device.bf16_flops > device.bytes_per_second > 1e9

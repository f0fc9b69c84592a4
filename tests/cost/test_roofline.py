"""The roofline against hand counts, and against the bytes of real packed modules."""

import dataclasses

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.cost import roofline
from bwla_compiler.cost.devices import DEVICES, Device
from bwla_compiler.cost.roofline import region_cost, symbolic_cost, symbolic_crossover
from bwla_compiler.runtime.modules import PackedExperts, PackedLinear, stored_bytes
from bwla_compiler.spec import LinearSpec, TransformSpec

H100 = DEVICES["h100-sxm"]


def test_one_plane_by_hand() -> None:
    cost = region_cost(LinearSpec(1024, (2048, 2048)), tokens=3, device=H100)
    assert cost.stored == 4096 * 1024 // 8 + 2 * 4096 + 2  # signs, row scales, an exponent each
    # read x in 16 bit, write and read codes, write 16 bit
    assert cost.bytes == cost.stored + 3 * (2 * 1024 + 1024 + 1024 + 2 * 4096)
    assert cost.ops == 2 * 3 * 4096 * 1024
    assert cost.seconds == pytest.approx(cost.bytes / 3.35e12)
    assert cost.bound == "memory"


def test_all_parts_by_hand() -> None:
    transform = TransformSpec("kronecker", n1=16, n2=64, left=True, right=True, scaled=True)
    spec = LinearSpec(1024, (512,), planes=2, scale_kind="group", rank=8, transform=transform, bias=True)
    cost = region_cost(spec, tokens=1, device=H100)
    weights = 2 * 512 * (128 + 2 * 8) + 1 + 8 * (1024 + 512) + 2 * 8 + 1 + 4 * 512
    extras = 2 * 16**2 + 1 + 2 * 64**2 + 1 + 2 * 1024 + 1
    assert cost.stored == weights + extras
    assert cost.bytes == cost.stored + (2 + 1) * 1024 + 1024 + 2 * 512
    assert cost.ops == 2 * (2 * 512 * 1024 + 8 * (1024 + 512)) + 1024 * (2 * 16 + 2 * 64 + 1)
    # one token's prologue runs on one of 132 processors
    assert cost.prologue_seconds == pytest.approx(1024 * (2 * 16 + 2 * 64 + 1) * 132 / 989.5e12)


def test_the_crossover_by_hand() -> None:
    spec = LinearSpec(4096, (4096,))
    cost = region_cost(spec, tokens=1, device=H100)
    per_token = 4096 + 2 * 4096
    by_hand = cost.stored / (2 * 4096**2 * 3.35e12 / 1979e12 - per_token)
    assert cost.crossover == pytest.approx(by_hand)
    for tokens, bound in ((int(by_hand), "memory"), (int(by_hand) + 1, "compute")):
        assert region_cost(spec, tokens=tokens, device=H100).bound == bound


def test_narrow_outputs_never_become_bound_by_computing() -> None:
    assert region_cost(LinearSpec(4096, (8,)), tokens=1, device=H100).crossover is None


sizes = st.integers(1, 300)


@st.composite
def specs(draw: st.DrawFn) -> LinearSpec:
    n1, n2 = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    left, right, scaled = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    kind = "kronecker" if left or right or scaled else "none"
    return LinearSpec(
        in_features=n1 * n2,
        out_features=tuple(draw(st.lists(sizes, min_size=1, max_size=3))),
        planes=draw(st.integers(1, 4)),
        scale_kind=draw(st.sampled_from(("row", "row+column", "group"))),
        rank=draw(st.integers(0, 5)),
        transform=TransformSpec(kind, n1, n2, left, right, scaled),
        activation_bits=draw(st.sampled_from((4, 8, 16))),
        bias=draw(st.booleans()),
    )


@given(specs())
@settings(deadline=None, max_examples=40)
def test_stored_bytes_are_those_of_the_modules(spec: LinearSpec) -> None:
    members = [PackedLinear(dataclasses.replace(spec, out_features=(out,)), device="meta") for out in spec.out_features]
    whole = torch.nn.Module()
    whole.transform = members[0].transform  # one, which the members share
    for i, member in enumerate(members):
        member.transform = None
        whole.add_module(str(i), member)
    assert region_cost(spec, tokens=1, device=H100).stored == stored_bytes(whole)


@given(specs(), st.integers(1, 5))
@settings(deadline=None, max_examples=15)
def test_stored_bytes_of_experts_are_those_of_the_modules(spec: LinearSpec, n_experts: int) -> None:
    spec = dataclasses.replace(spec, out_features=spec.out_features[:1], bias=False)
    module = PackedExperts(spec, n_experts, device="meta")
    cost = region_cost(spec, tokens=1, device=H100, n_experts=n_experts)
    assert cost.stored == stored_bytes(module)


def test_experts_are_read_as_far_as_tokens_take_them() -> None:
    spec = LinearSpec(64, (96,), activation_bits=16)
    one = 96 * 8 + 2 * 96
    for tokens, read in ((1, 2), (3, 6), (4, 8), (100, 8)):
        cost = region_cost(spec, tokens=tokens, device=H100, n_experts=8, n_used=2)
        assert cost.bytes == int((8 * one + 1) * read / 8 + 2 * tokens * (2 * 64 + 2 * 96))
        assert cost.ops == 2 * 2 * tokens * 64 * 96
    assert cost.stored == 8 * one + 1


def test_decode_is_bound_by_memory_and_prefill_by_compute() -> None:
    spec = LinearSpec(4096, (4096,))
    assert region_cost(spec, tokens=1, device=H100).bound == "memory"
    prefill = region_cost(spec, tokens=8192, device=H100)
    assert prefill.bound == "compute"
    assert prefill.seconds - prefill.prologue_seconds == pytest.approx(prefill.ops / H100.int8_ops_per_second)


def test_float_activations_run_at_the_float_peak() -> None:
    spec = LinearSpec(4096, (4096,), activation_bits=16)
    cost = region_cost(spec, tokens=8192, device=H100)
    assert cost.seconds == pytest.approx(cost.ops / H100.bf16_flops)
    assert cost.prologue_seconds == 0
    rounded = region_cost(dataclasses.replace(spec, activation_bits=8), tokens=8192, device=H100)
    assert rounded.seconds < cost.seconds


def test_expressions_can_be_differentiated_and_agree_with_the_numbers() -> None:
    stored = symbolic_cost().stored.subs({roofline.members: 1, roofline.experts: 1})
    first, second = (stored.subs(roofline.rank, r) for r in (1, 2))
    assert sp.simplify(second - first - (roofline.n_in + roofline.n_out + 2)) == 0
    costs = [region_cost(LinearSpec(64, (96,), rank=r), tokens=5, device=H100) for r in (1, 2)]
    assert costs[1].stored - costs[0].stored == 64 + 96 + 2


def test_the_crossover_is_where_both_times_are_equal() -> None:
    product = symbolic_cost().product
    memory, compute = roofline.memory_seconds(product), roofline.compute_seconds(product)
    plain = {roofline.experts: 1, roofline.used: 1, roofline.M: symbolic_crossover().subs(roofline.experts, 1)}
    values = dict(zip(roofline.SYMBOLS, roofline.sizes(LinearSpec(4096, (512,), rank=8)), strict=True))
    peaks = dict(zip(roofline.PEAKS, roofline.peaks(H100), strict=True))
    difference = ((memory - compute) / compute).subs(plain).subs(values).subs(peaks)
    assert abs(float(difference)) < 1e-12  # rounding of float64 peaks


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_devices_are_plausible_and_have_sources(device: Device) -> None:
    assert device.source
    assert device.units >= 1
    assert device.int8_ops_per_second > device.bf16_flops > device.bytes_per_second > 1e9

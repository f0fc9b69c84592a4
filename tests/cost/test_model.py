"""Whole models: hand counts of Qwen3-32B and of attention, crossovers, experts."""

import pytest
import sympy as sp

from bwla_compiler.cost.devices import DEVICES
from bwla_compiler.cost.model import (
    AttentionShape,
    B,
    C,
    GroupShape,
    KeptShape,
    ModelShape,
    TableShape,
    attention_stage,
    float_shape,
    kept_stage,
    table_stage,
)
from bwla_compiler.cost.roofline import M
from bwla_compiler.spec import INT8_ROWS, Coding, LinearSpec

H100 = DEVICES["h100-sxm"]
LAYERS = 64


def qwen3_32b() -> ModelShape:
    groups = (
        GroupShape("qkv", LinearSpec(5120, (8192, 1024, 1024)), LAYERS),
        GroupShape("o", LinearSpec(8192, (5120,)), LAYERS),
        GroupShape("gate_up", LinearSpec(5120, (25600, 25600)), LAYERS),
        GroupShape("down", LinearSpec(25600, (5120,)), LAYERS),
    )
    tables = (TableShape("embed", 151936, 5120, INT8_ROWS, True), TableShape("head", 151936, 5120, INT8_ROWS, False))
    return ModelShape(groups, tables, attention=(AttentionShape(LAYERS, 64, 8, 128),))


def test_a_16_bit_model_by_hand() -> None:
    per_layer = 5120 * (8192 + 2 * 1024) + 8192 * 5120 + 3 * 5120 * 25600
    plain = float_shape(qwen3_32b())
    assert plain.stored == 2 * (LAYERS * per_layer + 2 * 151936 * 5120)
    # 64 GB a token at 3.35 TB/s are 52 tokens a second
    assert 1 / plain.seconds(H100, batch=1, context=1) == pytest.approx(52.3, rel=0.01)


def test_a_packed_model_by_hand() -> None:
    shape = qwen3_32b()
    rows = (10240, 5120, 51200, 5120)
    columns = (5120, 8192, 5120, 25600)
    packed = sum(r * c // 8 + 2 * r for r, c in zip(rows, columns, strict=True)) + 3 + 1 + 2 + 1
    table = 151936 * 5120 + 2 * 151936 + 1
    assert shape.stored == LAYERS * packed + 2 * table
    activations = LAYERS * sum(4 * c + 2 * r for r, c in zip(rows, columns, strict=True))
    ends = 5120 + 2 + 2 * 5120 + 2 * (5120 + 151936)  # a row of the embedding, the head's input and output
    cache = LAYERS * 2 * 2 * 8 * 128 * (1000 + 1)
    moved = shape.moved.subs({M: 1, B: 1, C: 1000})
    assert moved == LAYERS * packed + table + activations + ends + cache
    assert float_shape(shape).stored / shape.stored == pytest.approx(11.8, rel=0.05)


def test_a_head_of_4_bits_by_hand() -> None:
    stage = table_stage(TableShape("head", 1000, 130, Coding(4, 64), False), float_bytes=2)
    # 65 bytes of codes a row, three float16 scales; an exponent of all
    assert stage.stored == 1000 * (65 + 6) + 1
    assert stage.moved.subs(M, 1) == stage.stored + 2 * (130 + 1000)


def test_attention_by_hand() -> None:
    stage = attention_stage(AttentionShape(2, 8, 4, 16))
    # 3 sequences of 5 new tokens each after 2 old ones: the new ones see 3, 4, 5, 6 and 7
    seen = {M: 15, B: 3, C: 7}
    assert stage.moved.subs(seen) == 2 * 2 * 2 * 4 * 16 * (3 * 7 + 15)
    assert stage.float_ops.subs(seen) == 2 * 4 * 8 * 16 * 3 * (3 + 4 + 5 + 6 + 7)
    assert stage.stored == 0


def test_a_window_bounds_what_is_read() -> None:
    whole, near = (attention_stage(AttentionShape(1, 8, 4, 16, window)) for window in (0, 32))
    short, long = {M: 1, B: 1, C: 20}, {M: 1, B: 1, C: 500}
    assert near.moved.subs(short) == whole.moved.subs(short)
    assert near.moved.subs(long) == whole.moved.subs({**long, C: 32})
    assert near.float_ops.subs(long) == whole.float_ops.subs({**long, C: 32})


def test_the_crossover_is_where_both_times_are_equal() -> None:
    shape = qwen3_32b()
    crossover = shape.crossover(H100, context=0)
    assert crossover is not None
    linear = ModelShape(shape.groups, shape.tables)
    values = {B: crossover, C: 1, M: crossover}
    memory = float(linear.moved.subs(values)) / H100.bytes_per_second
    int8 = sum(float(stage.int8_ops.subs(values)) for _, stage, _ in linear.stages)
    other = sum(float(stage.float_ops.subs(values)) for _, stage, _ in linear.stages)
    assert memory == pytest.approx(int8 / H100.int8_ops_per_second + other / H100.bf16_flops, rel=1e-9)


def test_a_long_context_stays_bound_by_memory() -> None:
    shape = qwen3_32b()
    assert shape.crossover(H100, context=1) is not None
    assert shape.crossover(H100, context=100_000) is None


def test_decoding_is_faster_packed_and_slower_with_context() -> None:
    shape = qwen3_32b()
    times = [shape.seconds(H100, batch=1, context=context) for context in (1, 1000, 100_000)]
    assert times == sorted(times)
    assert float_shape(shape).seconds(H100, batch=1, context=1) / times[0] > 8


def test_experts_are_read_as_far_as_tokens_take_them() -> None:
    stage = kept_stage(KeptShape("experts", 1280, experts=128, used=8), float_bytes=2)
    assert [stage.moved.subs(M, m) for m in (1, 4, 16, 400)] == [160, 640, 2560, 2560]
    assert stage.float_ops == 2 * M * sp.Integer(80)

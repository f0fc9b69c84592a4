"""The parts of a step: they add up to the whole model's seconds, bytes and operations on every device."""

import pytest

from bwla_compiler.cost.devices import DEVICES
from bwla_compiler.cost.model import AttentionShape, GroupShape, KeptShape, ModelShape, TableShape, float_shape
from bwla_compiler.cost.parts import PARTS, step_parts
from bwla_compiler.cost.roofline import M
from bwla_compiler.spec import INT8_ROWS, LinearSpec, TransformSpec

DOWN = LinearSpec(4096, (1024,), transform=TransformSpec("hadamard", 128, 32, False, True), rank=16)
SHAPE = ModelShape(
    (GroupShape("q, k", LinearSpec(1024, (1024, 512)), 2), GroupShape("down", DOWN, 3)),
    (TableShape("head", 5000, 1024, INT8_ROWS, False), TableShape("embed", 5000, 1024, INT8_ROWS, True)),
    (KeptShape("router", 4096),),
    (AttentionShape(2, 8, 8, 128),),
    rest=3000,
)


@pytest.mark.parametrize("tokens", [1, 512])
def test_parts_add_up(tokens: int) -> None:
    from bwla_compiler.cost.model import B, C

    found = step_parts(SHAPE, DEVICES.values(), batch=1, context=512, tokens=tokens)
    step = {M: tokens, B: 1, C: 512}
    for name, device in DEVICES.items():
        assert sum(p.seconds for p in found[name]) == pytest.approx(
            SHAPE.seconds(device, batch=1, context=512, tokens=tokens), rel=1e-9
        )
        assert sum(p.n_bytes for p in found[name]) == pytest.approx(float(SHAPE.moved.subs(step)), rel=1e-9)
        assert sum(p.ops for p in found[name]) == pytest.approx(float(SHAPE.ops.subs(step)), rel=1e-9)
        assert all(p.seconds >= 0 for p in found[name])


def test_every_part_is_there_once_and_in_order() -> None:
    (found,) = step_parts(SHAPE, [DEVICES["h100-sxm"]], batch=1, context=512, tokens=1).values()
    assert tuple(p.name for p in found) == PARTS
    (plain,) = step_parts(float_shape(SHAPE), [DEVICES["h100-sxm"]], batch=1, context=512, tokens=1).values()
    assert {p.name for p in plain} == {"kept", "embedding", "head", "attention", "rest"}

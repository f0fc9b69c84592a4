"""Anchors: the tensors of the module that they stand for, as it is now."""

import copy
from collections.abc import Callable

import pytest
import torch

from bwla_compiler.errors import BwlaError, GradientError, ShapeError
from bwla_compiler.runtime import anchors
from bwla_compiler.runtime.anchors import LINEAR_PARTS, module_of, part_of, parts
from bwla_compiler.runtime.functions import Norm
from bwla_compiler.runtime.modules import PackedLinear
from bwla_compiler.runtime.online import OnlineTransform
from bwla_compiler.spec import LinearSpec, TransformSpec

BWLA = torch.ops.bwla


def linear(*, rank: int = 2, online: bool = True) -> PackedLinear:
    transform = TransformSpec("kronecker", 4, 8, left=True, right=True, scaled=True) if online else TransformSpec()
    made = PackedLinear(LinearSpec(32, (24,), rank=rank, transform=transform, activation_bits=6, bias=True))
    generator = torch.Generator().manual_seed(0)
    for name, buffer in made.named_buffers():
        if "exponent" not in name and not buffer.is_floating_point():
            low, high = (0, 255) if buffer.dtype == torch.uint8 else (0x2C00, 0x3C00)
            high, low = (127, -127) if buffer.dtype == torch.int8 else (high, low)
            buffer.copy_(torch.randint(low, high, buffer.shape, generator=generator))
    return made


def test_parts_are_what_facts_say() -> None:
    made = linear()
    held = {name: buffer for name, buffer in made._buffers.items() if buffer is not None}
    assert parts(made.facts) == {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in held.items()}
    for name in LINEAR_PARTS:
        assert part_of(made.anchor, name) is made._buffers[name]
        assert (name in parts(made.facts)) == (made._buffers[name] is not None)


def test_operators_give_the_bits_of_those_that_take_tensors() -> None:
    made, x = linear(), torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    assert made.transform is not None
    y = BWLA.transform_of(x, made.transform.anchor, made.transform.facts)
    assert torch.equal(y, made.transform(x))
    assert torch.equal(BWLA.linear_of(y, made.anchor, made.facts, 6), made(x))
    norm = Norm("rms_norm", 1e-5, torch.nn.Parameter(torch.rand(32), requires_grad=False), None)
    assert torch.equal(BWLA.prologue_of(x, norm.anchor, norm.facts, norm.kind, norm.eps), norm(x))


def test_a_copy_of_a_part_is_no_part() -> None:
    made = linear()
    found = BWLA.part(made.anchor, "signs", made.facts)
    assert torch.equal(found, made.signs)
    assert found.data_ptr() != made.signs.data_ptr()


def test_shapes_are_known_without_values() -> None:
    made = linear()
    y = BWLA.linear_of(torch.empty(2, 5, 32, device="meta"), made.anchor.to("meta"), made.facts, 6)
    assert (y.shape, y.device.type) == ((2, 5, 24), "meta")
    signs = BWLA.part(made.anchor.to("meta"), "signs", made.facts)
    assert (signs.shape, signs.dtype) == (made.signs.shape, torch.uint8)


def test_gradients_are_refused_when_they_are_asked_for() -> None:
    made, x = linear(online=False), torch.ones(2, 32, requires_grad=True)
    y = BWLA.linear_of(x, made.anchor, made.facts, 6)
    with pytest.raises(GradientError):
        y.sum().backward()


REPLACING: dict[str, Callable[[PackedLinear], object]] = {
    "attribute": lambda m: setattr(m, "signs", m.signs.clone()),
    "buffers": lambda m: m._buffers.__setitem__("signs", m.signs.clone()),
    "update": lambda m: m._buffers.update(signs=m.signs.clone()),
    "delete": lambda m: delattr(m, "signs"),
    "pop": lambda m: m._buffers.pop("signs"),
    "clear": lambda m: m._buffers.clear(),
    "cast": lambda m: m.to(torch.bfloat16),
    "assign": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
}


@pytest.mark.parametrize("name", REPLACING)
def test_what_is_replaced_is_counted_once_it_was_asked_for(name: str) -> None:
    made = linear()
    before = anchors.REPLACED
    REPLACING[name](made)
    assert before == anchors.REPLACED
    made = linear()
    part_of(made.anchor, "signs")
    REPLACING[name](made)
    assert before < anchors.REPLACED


@pytest.mark.parametrize("name", ["signs", "row_scale", "bias"])
def test_another_shape_is_refused_by_name(name: str) -> None:
    made = linear(online=False)
    facts = made.facts
    made._buffers[name] = torch.zeros(1, 3, 4, dtype=made._buffers[name].dtype)  # type: ignore[union-attr]
    with pytest.raises(
        ShapeError, match=rf"{name} of a compiled module is .*\[1, 3, 4\] by now; compiled for {name}: "
    ):
        BWLA.linear_of(torch.ones(1, 32), made.anchor, facts, 6)


def test_an_anchor_without_its_module_is_refused() -> None:
    gone, other = linear().anchor, linear()
    for anchor in (gone, torch.empty(0, dtype=torch.int8), copy.deepcopy(other.anchor)):
        with pytest.raises(BwlaError, match="stands for no packed module"):
            module_of(anchor)


def test_a_transform_is_anchored_too() -> None:
    transform = OnlineTransform(TransformSpec("hadamard", 4, 8, left=True, right=True, scaled=False))
    assert part_of(transform.anchor, "scale") is None
    assert part_of(transform.anchor, "left") is transform.left


def test_dynamo_takes_whether_anchors_serve_for_a_constant() -> None:
    """Marked as torch's decorator marks a function, without importing Dynamo for it."""
    assert vars(torch.compiler.assume_constant_result(lambda: False)) == vars(anchors.anchors_serve)

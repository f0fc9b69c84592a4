"""Students: gradients are those of the dense weight, no weight is kept as floats, latents follow the gradient."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from bwla_compiler.calibrate.student import Planes, Student, students
from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.runtime.modules import EndLinear, PackedLinear, TiedHead
from tests.calibrate.test_quantize import logits, relative
from tests.calibrate.test_tune import quantized

IN, OUT, TOKENS = 300, 40, 7


def packed(*, planes: int = 1, groups: int = 1) -> PackedLinear:
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (planes, OUT, IN), generator=generator, dtype=torch.int8) * 2 - 1
    scale = torch.rand(planes, OUT, groups, generator=generator) + 0.5
    weight = BinaryWeight(signs, scale, group_size=128 if groups > 1 else 0)
    return PackedLinear.from_binary(weight, activation_bits=16)


def student(source: PackedLinear, *, learn: bool = False) -> Student:
    found = Student(source, {})
    if learn:
        found.planes.wake()
    found.scale.requires_grad_(True)
    return found


def inputs() -> Tensor:
    return torch.randn(2, TOKENS, IN, generator=torch.Generator().manual_seed(4), requires_grad=True)


@contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    """Gather what autograd saves of a forward pass."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        yield found


@pytest.mark.parametrize(("planes", "groups"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_gradients_are_those_of_the_dense_weight(planes: int, groups: int) -> None:
    source = packed(planes=planes, groups=groups)
    found, x = student(source), inputs()
    found(x).square().sum().backward()
    of_x, of_scale = x.grad, found.scale.grad
    x.grad, change = None, torch.zeros_like(found.scale, requires_grad=True)
    scales = (found.first * change.exp()).repeat_interleave(128 if groups > 1 else IN, 2)[..., :IN]
    linear(x, (scales * found.planes.signs()).sum(0)).square().sum().backward()
    for ours, theirs in ((of_x, x.grad), (of_scale, change.grad)):
        assert ours is not None
        assert theirs is not None
        # float32 sums of 300 and 560 products in another order
        assert relative(ours, theirs) < 1e-5


def test_no_weight_is_kept_as_floats_for_the_backward_pass() -> None:
    found = student(packed())
    held = [t for t in (*vars(found.planes).values(), *found.state_dict().values()) if isinstance(t, Tensor)]
    with kept_for_backward() as saved:
        found(inputs())
    assert all(t.numel() < OUT * IN for t in (*held, *saved))
    assert any(t.shape == (2, TOKENS, IN) for t in saved)  # the hooks do see what is kept


def test_a_latent_moves_by_the_rate_whatever_the_size_of_its_row_and_column() -> None:
    planes, generator = Planes(packed().signs, IN), torch.Generator().manual_seed(5)
    planes.wake()
    directions = torch.randn(OUT, IN, generator=generator).sign()
    sizes = torch.rand(OUT, 1, generator=generator).exp() * (9 * torch.rand(IN, generator=generator)).exp()
    before = planes.signs()
    for rate, flipped in (
        (0.0, 0.0),
        (0.5, 0.0),
        (0.6, 1.0),
    ):  # each is 1 from its flip: after 0.5 and 0.6 all are past
        planes.rate = rate
        planes.learn(1e-6 * sizes * directions)
        found = planes.signs()
        assert torch.equal(found != before, (before == directions) & (flipped > 0))
    assert torch.equal(Planes(planes.packed(), IN).signs(), planes.signs())


def test_signs_that_fall_asleep_stay_as_they_have_become() -> None:
    planes = Planes(packed().signs, IN)
    planes.wake()
    planes.rate = 1.5
    planes.learn(torch.ones(OUT, IN))
    expected = planes.signs()
    planes.sleep()
    assert planes.latent is None
    assert torch.equal(planes.signs(), expected)
    planes.learn(-torch.ones(OUT, IN))
    assert torch.equal(planes.signs(), expected)


def test_the_backward_pass_teaches_the_signs() -> None:
    found, x = student(packed(), learn=True), inputs()
    found.planes.rate = 1.5
    before = found.planes.signs()
    found(x).sum().backward()  # d/dW of the sum is the sum of the inputs, in every row
    of_weight = x.detach().sum((0, 1)).expand(OUT, IN)
    flipped = found.planes.signs()[0] != before[0]
    assert flipped.any()
    assert ((of_weight * before[0])[flipped] > 0).all()


def test_the_stand_ins_compute_what_the_packed_modules_do() -> None:
    model, _ = quantized("qwen3", steps=0)
    expected = logits(model)
    with students(model) as stand_ins:
        assert not any(isinstance(m, (PackedLinear, EndLinear, TiedHead)) for m in model.modules())
        assert {student.block for student in stand_ins} == {"model.layers.0", "model.layers.1"}
        for student in stand_ins:
            student.planes.wake()
        found = logits(model)
    # float32 sums in another order; a code that so rounds the other way moves a logit by a step of 6 bits
    assert relative(found, expected) < 1e-2
    assert torch.equal(logits(model), expected)  # nothing was tuned: packing again changes no bit


def test_an_interrupt_puts_the_packed_modules_back() -> None:
    model, _ = quantized("llama", steps=0)
    expected = logits(model)
    with pytest.raises(KeyboardInterrupt), students(model):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), expected)

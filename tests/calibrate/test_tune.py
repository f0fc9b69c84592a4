"""Tuning: the loss falls, bits stay, the same seed gives the same bytes, and a failure leaves the model."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bwla_compiler.calibrate import affordable
from bwla_compiler.calibrate import tune as tuning_module
from bwla_compiler.calibrate.report import QuantizeReport
from bwla_compiler.calibrate.student import Student
from bwla_compiler.errors import GradientError
from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.recipe import Tuning
from bwla_compiler.runtime.modules import PackedLinear
from tests import tiny
from tests.calibrate.test_quantize import fit, logits, recipe, relative, tokens
from tests.wider import wider


def quantized(name: str, *, steps: int, base: str = "bwla-w1a6", **changes: object) -> tuple[nn.Module, QuantizeReport]:
    model = tiny.make(name)
    report = fit(model, name, recipe(base, tuning__steps=steps, **changes), tokens())
    return model, report


@pytest.mark.parametrize("name", ["llama-tied", *wider("gpt2")])
def test_tuning_moves_the_logits_towards_the_float_model_and_keeps_signs_and_bits(name: str) -> None:
    ids = tiny.ids(batch=64, length=24, seed=9)  # of few tokens chance decides
    plain, plain_report = quantized(name, steps=0)
    tuned, report = quantized(name, steps=48, tuning__signs=0.0)
    with torch.no_grad():
        reference, before_it, after_it = (model(ids).logits for model in (tiny.make(name), plain, tuned))
    assert relative(after_it, reference) < 0.99 * relative(before_it, reference)
    assert report.bits == plain_report.bits
    before, after = plain.state_dict(), tuned.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if key.endswith("signs"))
    assert any(not torch.equal(after[key], before[key]) for key in before if key.endswith("row_scale"))
    assert {type(m) for m in tuned.modules()} == {type(m) for m in plain.modules()}
    assert not any(p.requires_grad or p.grad is not None for p in tuned.parameters())
    assert "tune" in {p.name for p in report.passes}


Quantized = tuple[nn.Module, QuantizeReport]


@pytest.fixture(scope="module")
def still() -> Quantized:
    return quantized("llama", steps=96, tuning__signs=0.0)


@pytest.fixture(scope="module")
def learnt() -> Quantized:
    """At 0.2 a tiny random model gains some 4% more; at 0.3 chance decides, and so the processor's order of sums."""
    return quantized("llama", steps=96, tuning__signs=0.2)


def test_signs_that_learn_lower_the_loss_further_and_cost_no_bit(still: Quantized, learnt: Quantized) -> None:
    assert loss(learnt[1]) < loss(still[1])
    assert learnt[1].bits == still[1].bits
    assert flipped(learnt[0], still[0])


def test_the_same_seed_gives_the_same_bytes_with_signs_that_learn(learnt: Quantized) -> None:
    again, _ = quantized("llama", steps=96, tuning__signs=0.2)
    first, second = learnt[0].state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_signs_of_one_block_at_a_time_learn_too(still: Quantized) -> None:
    learnt, report = quantized("llama", steps=96, tuning__signs=0.2, tuning__signs_at_once="block")
    assert loss(report) < loss(still[1])
    assert {name.split(".")[2] for name in flipped(learnt, still[0])} == {"0", "1"}
    assert "one block at a time" in next(p.changed for p in report.passes if p.name == "tune")[0][0]


def flipped(model: nn.Module, other: nn.Module) -> set[str]:
    """Return the names of sign tensors that differ."""
    theirs = other.state_dict()
    return {k for k, v in model.state_dict().items() if k.endswith("signs") and not torch.equal(v, theirs[k])}


def test_products_of_bfloat16_tune_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fastest = quantized("llama", steps=24, tuning__signs=0.0)
    exact, report = quantized("llama", steps=24, tuning__signs=0.0, tuning__products="float32")
    assert loss(fastest) == pytest.approx(loss(report), rel=0.1)
    monkeypatch.setattr("bwla_compiler.numerics.products.native_bfloat16", lambda: False)
    elsewhere, _ = quantized("llama", steps=24, tuning__signs=0.0)
    assert all(
        torch.equal(a, b) for a, b in zip(exact.state_dict().values(), elsewhere.state_dict().values(), strict=True)
    )


def packed() -> PackedLinear:
    return PackedLinear.from_binary(
        BinaryWeight(torch.ones(1, 3, 8, dtype=torch.int8), torch.ones(1, 3, 1)), activation_bits=16
    )


def loss(report: QuantizeReport) -> float:
    """Return the divergence after tuning that the report tells."""
    ((_, what),) = next(p.changed for p in report.passes if p.name == "tune")
    return float(what.split()[-1])


def test_signs_alone_are_tuned_where_all_other_rates_are_zero() -> None:
    still = dict.fromkeys(("scales", "diagonals", "pairs", "gains", "biases"), 0.0)
    plain, _ = quantized("llama", steps=0)
    model, _ = quantized("llama", steps=48, tuning__signs=0.3, **{f"tuning__{k}": v for k, v in still.items()})
    before = plain.state_dict()
    changed = {k.rpartition(".")[2] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"signs"}


def test_blocks_computed_twice_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = quantized("qwen3", steps=2, tuning__signs=0.1)
    counted: list[object] = []
    monkeypatch.setattr(tuning_module, "KEPT_BYTES", 0)
    monkeypatch.setattr(tuning_module, "checkpoint", lambda *a, **k: (counted.append(a), checkpoint(*a, **k))[1])
    twice, _ = quantized("qwen3", steps=2, tuning__signs=0.1)
    assert counted
    state = kept.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in twice.state_dict().items())
    assert not any("forward" in vars(module) for module in twice.modules())


def test_the_divergence_is_that_of_the_definition_with_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 300, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    ours.requires_grad_(True)
    expected = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
    (wanted,) = torch.autograd.grad(3 * expected, ours)
    found = tuning_module._Divergence.apply(ours, theirs)
    (gradient,) = torch.autograd.grad(3 * found, ours)
    # the chances are float32
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert relative(gradient, wanted) < 1e-5


@pytest.mark.parametrize(("steps", "turns"), [(5, "00111"), (1, "1"), (6, "000111")])
def test_blocks_take_turns_and_each_learns_as_far_as_if_it_were_all(steps: int, turns: str) -> None:
    found = [Student(packed(), {}, block=f"layers.{i // 2}") for i in range(4)]
    learning = tuning_module._Learning(found, Tuning(steps=steps, signs=0.4, signs_at_once="block"))
    rates: list[list[float]] = []
    for step in range(steps):
        learning.turn(step)
        awake = {student.block[-1] for student in found if student.planes.latent is not None}
        assert awake == {turns[step]}
        rates.append([student.planes.rate for student in found])
    learning.end()
    assert all(student.planes.latent is None for student in found)
    walked = [math.hypot(*of_student) for of_student in zip(*rates, strict=True)]
    expected = [0.4 if str(i // 2) in turns else 0.0 for i in range(4)]
    assert walked == pytest.approx(expected)


def test_where_memory_is_short_less_is_tuned_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affordable, "memory_bytes", lambda: 1000)
    _, report = quantized("llama", steps=2)
    assert report.recipe.tuning.steps == 0
    (done,) = (p for p in report.passes if p.name == "tune")
    assert not done.changed
    assert done.skipped[0][1].startswith("nothing is tuned: tuning as asked for takes ")


@pytest.mark.parametrize("base", ["bwla-paper", *wider("bwla-folded", "rtn")])
def test_group_and_column_scales_and_no_rotation_are_tuned_too(base: str) -> None:
    reference = logits(tiny.make("llama"))
    plain, tuned = (quantized("llama", steps=steps, base=base, activations__bits=8)[0] for steps in (0, 24))
    assert relative(logits(tuned), reference) < relative(logits(plain), reference)


def test_where_gradients_do_not_flow_tuning_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> tuple[float, float]:
        raise GradientError("a packed module")

    monkeypatch.setattr("bwla_compiler.calibrate.quantize.tune", refuse)
    model, report = quantized("llama", steps=2)
    (done,) = (p for p in report.passes if p.name == "tune")
    assert done.skipped == [("all", "left as fitted: a packed module")]
    assert torch.isfinite(logits(model)).all()


def test_a_loss_that_does_not_fall_leaves_the_model_as_fitted() -> None:
    plain, _ = quantized("llama", steps=0)
    wild, report = quantized("llama", steps=2, tuning__scales=9.0, tuning__gains=9.0)
    (done,) = (p for p in report.passes if p.name == "tune")
    assert not done.changed
    assert "lower the tuning's rates" in done.skipped[0][1]
    after = wild.state_dict()
    assert all(torch.equal(after[key], value) for key, value in plain.state_dict().items())

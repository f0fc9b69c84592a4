"""BindCalls on graphs of models and of small functions: which calls become a routine, and which stay as they are."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.bind_calls import BindCalls
from bwla_compiler.runtime import ops
from bwla_compiler.runtime.programs import Program
from bwla_compiler.runtime.routines import Routine, parsed
from tests import tiny
from tests.packed import packed
from tests.passes.test_fuse_kernels import Fusing, count
from tests.runtime.test_ops import make_linear
from tests.wider import wider

BWLA = torch.ops.bwla
assert ops.LIBRARY is not None


class Binding(Fusing):
    """The same with BindCalls behind it, and the graph as a program."""

    report: PassReport

    def __init__(self) -> None:
        super().__init__(self._bind)

    def _bind(self, graph: Graph) -> None:
        self.report = BindCalls().run(graph)

    def __call__(self, gm: GraphModule, inputs: list[Tensor]) -> Any:
        return Program(super().__call__(gm, inputs), {})

    def routines(self) -> list[Routine]:
        """Return the graph's routines in order."""
        return [parsed(n.args[2]) for n in self.graphs[-1].nodes if str(n.target).startswith("bwla.routine")]


BETWEEN = [("none", 1), ("rms_norm", 2), ("silu_mul", 1), ("rms_norm", 3)]
"""(prologue, members) of the calls between two attentions."""

MODELS = {
    "llama": [BETWEEN[3:], BETWEEN, [*BETWEEN[:3], ("rms_norm", 0)]],
    "qwen3": [
        [*BETWEEN[3:], ("rms_norm", 0), ("rms_norm", 0)],
        [*BETWEEN, ("rms_norm", 0), ("rms_norm", 0)],
        [*BETWEEN[:3], ("rms_norm", 0)],
    ],
}


@pytest.mark.parametrize("name", ["qwen3", *wider("llama")])
def test_a_model_has_a_routine_between_two_attentions(name: str) -> None:
    model = packed(name)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(tiny.ids(), use_cache=False).logits
        compiled = torch.compile(model, backend=(backend := Binding()), fullgraph=True)
        for _ in range(2):
            assert torch.equal(compiled(tiny.ids(), use_cache=False).logits, expected)
    found = [[(step.kind, len(step.members)) for step in routine.steps] for routine in backend.routines()]
    assert found == MODELS[name]
    assert backend.report.skipped == []
    assert count(backend.graphs[-1], "fused_group") == 0


class Small(nn.Module):
    """Four linears of 16 channels and a function that calls them."""

    def __init__(self, function: "Function") -> None:
        super().__init__()
        self.function = function
        for i in range(4):
            signs, scale, _, _ = make_linear(16, 16, seed=i)
            self.register_buffer(f"signs{i}", signs)
            self.register_buffer(f"scale{i}", scale)
        self.register_buffer("gain", torch.rand(16) + 0.5)

    def linear(self, x: Tensor, i: int, *, scale: Tensor | None = None) -> Tensor:
        scale = getattr(self, f"scale{i}") if scale is None else scale
        normed = BWLA.prologue(x, "rms_norm", 1e-5, None, None)
        y: Tensor = BWLA.linear(normed, getattr(self, f"signs{i}"), scale, None, None, None, None, None, 16)
        return y

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


Function = Callable[[Small, Tensor], Any]


def bind(function: Function, x: Tensor | None = None, *, before: Callable[[Small], Any] = id) -> Binding:
    """Return what becomes of a function's calls; the compiled results are compared, before and after they are bound."""
    torch._dynamo.reset()
    model, x = Small(function), torch.randn(3, 16) if x is None else x
    before(model)
    with torch.no_grad():
        expected = model(x.clone())
        compiled = torch.compile(model, backend=(backend := Binding()), fullgraph=True)
        for _ in range(2):
            found = compiled(x.clone())
            for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
                torch.testing.assert_close(a, b)
    return backend


def sizes(backend: Binding) -> list[int]:
    return [len(routine.steps) for routine in backend.routines()]


def test_calls_that_read_each_other_are_one() -> None:
    backend = bind(lambda m, x: m.linear(m.linear(m.linear(x, 0), 1), 2))
    assert sizes(backend) == [3]
    assert backend.routines()[0].outputs == (3,)
    assert backend.report.changed == [("fused_group_default, fused_group_default_1, fused_group_default_2",
                                       "one routine of 6 weights")]  # fmt: skip


def test_independent_calls_are_one_with_both_results() -> None:
    backend = bind(lambda m, x: (m.linear(x, 0), m.linear(x.exp(), 1)))
    assert sizes(backend) == [2]
    assert backend.routines()[0].outputs == (2, 3)


def test_what_another_operator_computes_in_between_parts_them() -> None:
    backend = bind(lambda m, x: m.linear(m.linear(x, 0).sin(), 1))
    assert sizes(backend) == [1, 1]


def test_readers_of_inner_results_come_behind() -> None:
    def function(m: Small, x: Tensor) -> Any:
        first = m.linear(x, 0)
        beside = first.cos() + 1  # stands between the calls, and needs the first
        return m.linear(first, 1), beside

    backend = bind(function)
    assert sizes(backend) == [2]
    assert backend.routines()[0].outputs == (1, 2)


def test_a_gain_that_the_graph_computes_is_an_input() -> None:
    def function(m: Small, x: Tensor) -> Any:
        normed = BWLA.prologue(x, "rms_norm", 1e-5, 1 + m.gain, None)
        return BWLA.linear(normed, m.signs0, m.scale0, None, None, None, None, None, 16)

    backend = bind(function)
    (routine,) = backend.routines()
    assert routine.n_inputs == 2
    assert isinstance(routine.steps[0].gain, int)


def test_a_weight_that_the_graph_computes_leaves_its_call_alone() -> None:
    backend = bind(lambda m, x: m.linear(m.linear(m.linear(x, 0), 1, scale=2 * m.scale1), 2))
    assert sizes(backend) == [1, 1]
    assert count(backend.graphs[-1], "fused_group") == 1
    ((name, reason),) = backend.report.skipped
    assert (name, reason) == ("fused_group_default_1", "mul is no input that stays as it is")


def test_a_weight_that_the_graph_edits_is_seen_by_whoever_orders_it() -> None:
    def function(m: Small, x: Tensor) -> Any:
        normed = BWLA.prologue(x, "rms_norm", 1e-5, m.gain, None)
        y = BWLA.linear(normed, m.signs0, m.scale0, None, None, None, None, None, 16)
        m.gain.copy_(torch.ones_like(m.gain))  # the same values at every call: `bind` compares two
        m.scale1.copy_(torch.ones_like(m.scale1))
        return y, m.linear(x, 1)

    backend = bind(function, before=lambda m: (m.gain.fill_(1), m.scale1.fill_(1)))
    gains = [step.gain for routine in backend.routines() for step in routine.steps if step.gain is not None]
    assert all(isinstance(gain, int) for gain in gains)  # an input of its routine
    assert count(backend.graphs[-1], "fused_group") == 1  # scale1 is named by no text


def test_more_results_than_a_routine_may_have_are_split() -> None:
    backend = bind(lambda m, x: tuple(m.linear(x + i, i % 4) for i in range(8)))
    assert sizes(backend) == [4, 4]


@pytest.mark.parametrize(
    "shape, n_steps", [((3, 2, 8), 2), ((2, 3, 8), 1), ((6, 8), 1), ((48,), 1), ((3, 1, 16), 1)], ids=str
)
def test_only_a_norm_by_head_is_taken_in(shape: Sequence[int], n_steps: int) -> None:
    """Splitting channels into heads keeps tokens apart; other reshapings of 16 channels do not."""

    def function(m: Small, x: Tensor) -> Any:
        gain = m.gain[:8] * 1 if shape[-1] == 8 else None
        return BWLA.prologue(m.linear(x, 0).reshape(shape), "rms_norm", 1e-5, gain, None)

    backend = bind(function)
    assert sizes(backend) == [n_steps]
    assert count(backend.graphs[-1], "prologue") == 2 - n_steps


def test_transforms_before_and_behind_are_steps() -> None:
    factor, column_scale = torch.linalg.qr(torch.randn(4, 4))[0], torch.rand(16) + 0.5

    def transform(model: Small, x: Tensor) -> Tensor:
        y: Tensor = BWLA.transform(
            model.linear(BWLA.transform(x, None, model.factor, None), 0), model.column, None, None
        )
        return y * 2

    def parts(model: Small) -> None:
        model.register_buffer("factor", factor)
        model.register_buffer("column", column_scale)

    backend = bind(transform, before=parts)
    (routine,) = backend.routines()
    assert [(step.kind, len(step.members)) for step in routine.steps] == [("none", 0), ("rms_norm", 1), ("none", 0)]
    assert count(backend.graphs[-1], "transform") == 0


def test_a_norm_alone_is_no_routine() -> None:
    backend = bind(lambda m, x: BWLA.prologue(x, "rms_norm", 1e-5, m.gain, None))
    assert sizes(backend) == []
    assert count(backend.graphs[-1], "prologue") == 1


def test_calls_on_another_device_stay() -> None:
    with torch.device("meta"):
        backend, model = Binding(), Small(lambda m, x: m.linear(x, 0))
    torch._dynamo.reset()
    torch.compile(model.to("meta"), backend=backend)(torch.empty(3, 16, device="meta"))
    assert sizes(backend) == []
    assert count(backend.graphs[-1], "fused_group") == 1
    assert backend.report.skipped == [("fused_group_default", "its input is on meta")]

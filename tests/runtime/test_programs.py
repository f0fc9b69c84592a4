"""Routines: the same bits as the calls they stand for, bound once, and never run with weights that were edited."""

import dataclasses
import threading
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bwla_compiler.errors import BwlaError, GradientError, ShapeError
from bwla_compiler.runtime import native, ops, programs
from bwla_compiler.runtime.programs import Program, Table
from bwla_compiler.runtime.routines import Attention, Member, Place, Routine, Rows, Step, parsed
from bwla_compiler.spec import ROUTINE_RESULTS
from tests.runtime.test_fused import Case, make
from tests.runtime.test_ops import make_linear, without_native

BWLA = torch.ops.bwla
assert ops.LIBRARY is not None


@pytest.fixture(autouse=True)
def served() -> None:
    native.install()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Routine]:
    """The routines that Python ran, in turn."""
    found: list[Routine] = []
    run = Routine.run

    def noted(self: Routine, inputs: Any, weights: Any) -> list[Tensor]:
        found.append(self)
        return run(self, inputs, weights)

    monkeypatch.setattr(Routine, "run", noted)
    return found


def step_of(case: Case, arguments: list[Tensor], *, x: Place, gate: Place = None, residuals: Any = None) -> Step:
    """Return the step of a call, its weights added to the arguments."""
    a = case.operands()

    def place(weight: Tensor | None) -> Place:
        if weight is None:
            return None
        arguments.append(weight)
        return f"@{len(arguments) - 1}"

    residuals = residuals or [None] * len(case.members)
    members = tuple(
        Member(a[12][m].shape[1], tuple(place(a[i][m]) for i in (12, 13, 15, 16, 17, 18, 21, 23)), residuals[m])
        for m in range(len(case.members))
    )
    weights = tuple(place(a[i]) for i in (6, 7, 8, 9, 10, 11, 14, 22))
    return Step(a[2], a[3], a[20], case.x.shape[-1], 1, x, gate, place(a[4]), place(a[5]), weights, members)


@dataclasses.dataclass
class Block:
    """Two calls in a row and a norm by head of the second's result, as between two attentions."""

    bits: int = 6
    arguments: list[Tensor] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        x, first = make("none", 40, 3)
        stream = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))
        self.arguments += [x, stream]
        self.first = Case(x, first, [make_linear(24, 40, rank=2)], residuals=[stream], bits=self.bits)
        _, second = make("rms_norm", 24, 3, seed=1)
        self.second = Case(stream, second, [make_linear(24, 24, seed=2), make_linear(7, 24, seed=3)], bits=self.bits)
        self.gain = torch.rand(8, generator=torch.Generator().manual_seed(6))
        steps = [
            step_of(self.first, self.arguments, x=0, residuals=[1]),
            step_of(self.second, self.arguments, x=2),
        ]
        self.arguments.append(self.gain)
        norm = Step("rms_norm", 1e-5, 16, 8, 3, 3, None, f"@{len(self.arguments) - 1}", None, (None,) * 8, ())
        self.routine = Routine(2, (2, 4, 5), (*steps, norm))
        self.text = self.routine.text()
        self.program = Program(self.call, {})

    def call(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = BWLA.routine3(list(arguments[:2]), [], self.text)
        return results

    def __call__(self) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = self.program(*self.arguments)
        return results

    def expected(self) -> tuple[Tensor, ...]:
        """Return the results of the calls one by one, with the weights as they are among the arguments."""
        with torch.no_grad():
            return tuple(self.routine.run(self.arguments[:2], lambda place: self.arguments[int(place[1:])]))

    def check(self) -> None:
        for y, want in zip(self(), self.expected(), strict=True):
            assert torch.equal(y, want)


def test_a_routine_gives_the_bits_of_its_calls() -> None:
    block = Block()
    first = dataclasses.replace(block.first).run()
    second = dataclasses.replace(block.second, x=first[0]).run()
    want = (first[0], second[1], BWLA.prologue(second[0].view(3, 3, 8), "rms_norm", 1e-5, block.gain, None))
    for found in (block(), block()):  # by Python, and bound
        assert all(torch.equal(y, w) for y, w in zip(found, want, strict=True))


def test_the_second_call_is_bound(runs: list[Routine]) -> None:
    block = Block()
    block()
    assert runs == [block.routine]
    for _ in range(3):
        block()
    assert len(runs) == 1


EDITS: dict[str, Callable[[Block, int], Any]] = {
    "in place": lambda block, i: block.arguments[i].copy_(block.arguments[i].flip(0)),
    "another tensor": lambda block, i: block.arguments.__setitem__(i, block.arguments[i].flip(0)),
    "storage": lambda block, i: setattr(block.arguments[i], "data", block.arguments[i].flip(0)),
    "behind its back": lambda block, i: (
        block.arguments[i].data.copy_(block.arguments[i].flip(0)), native.forget(block.arguments[i])
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_of_any_weight_is_missed(edit: str, runs: list[Routine]) -> None:
    block = Block()
    block()
    count = len(runs)
    for i in range(2, len(block.arguments)):
        before = block.arguments[i].clone()
        EDITS[edit](block, i)
        if before.numel() > 1 and not torch.equal(before, block.arguments[i]):
            block.check()
            assert len(runs) >= count + 2, f"argument {i} was not read anew"  # `check` runs it once itself
            block.check()
        count = len(runs)


def test_a_weight_of_another_shape_at_the_same_address_is_read_as_it_is() -> None:
    block = Block()
    block()
    scale = next(a for a in block.arguments[2:] if a.shape == (1, 24, 1))
    scale.data = scale.data[:, :5]  # no guard may be there to see it
    with pytest.raises(ShapeError, match="scale"):
        block()


def test_a_weight_that_is_gone_is_named() -> None:
    block = Block()
    block()
    block.arguments[3] = None  # type: ignore[call-overload]
    with pytest.raises(BwlaError, match=r"is None by now: call torch\._dynamo\.reset"):
        block()


def test_torch_refuses_to_swap_a_bound_weight() -> None:
    """The one edit that neither an id nor a version shows."""
    block = Block()
    block()
    for weight in block.arguments[2:]:
        with pytest.raises(RuntimeError, match="weakref"):
            torch.utils.swap_tensors(weight, weight.clone())
    block.check()


def test_other_weights_are_bound_beside(runs: list[Routine]) -> None:
    """Two threads may run one compiled graph with two models: neither sees the other's weights."""
    block, other = Block(), Block()
    other.arguments[2:] = [a.flip(0) for a in other.arguments[2:]]
    want = [block.expected(), other.expected()]
    wrong: list[str] = []

    def work(arguments: list[Tensor], expected: tuple[Tensor, ...]) -> None:
        for _ in range(50):
            found = block.program(*arguments)
            if not all(torch.equal(y, w) for y, w in zip(found, expected, strict=True)):
                wrong.append("results of the other's weights")

    pairs = zip((block.arguments, other.arguments), want, strict=True)
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_programs_may_run_inside_each_other() -> None:
    inner, outer = Block(), Block(bits=16)
    want = outer.expected()

    def both(*arguments: Tensor) -> tuple[Tensor, ...]:
        inner.check()
        return outer.call(*arguments)

    program = Program(both, {})
    for _ in range(3):
        assert all(torch.equal(y, w) for y, w in zip(program(*outer.arguments), want, strict=True))
    assert programs._RUNNING.frame is None


def test_an_error_leaves_no_program_behind() -> None:
    block = Block()

    def fails(*arguments: Tensor) -> None:
        block.call(*arguments)
        raise ValueError("of the graph")

    program = Program(fails, {})
    for _ in range(2):
        with pytest.raises(ValueError, match="of the graph"):
            program(*block.arguments)
    with pytest.raises(BwlaError, match="inside its compiled graph alone"):
        block.call(*block.arguments)


def test_python_serves_where_cpp_does_not(runs: list[Routine]) -> None:
    block = Block()
    block()
    with without_native(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("BWLA_KERNELS", "torch")
        assert all(torch.equal(y, w) for y, w in zip(block(), block.expected(), strict=True))
        assert len(runs) == 3
    block.check()


def test_weights_without_versions_are_never_bound(runs: list[Routine]) -> None:
    block = Block()
    with torch.inference_mode():
        block.arguments = [a.clone() for a in block.arguments]
        block()
        block.arguments[4].copy_(block.arguments[4].flip(0))  # seen by no count
        block.check()
    assert len(runs) == 3


def test_what_does_not_fit_has_the_words_of_the_calls() -> None:
    block = Block()
    block()
    for x, stream in ((torch.ones(3, 41), block.arguments[1]), (block.arguments[0], torch.ones(3, 25))):
        with pytest.raises(ShapeError):
            block.program(x, stream, *block.arguments[2:])
    block.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_activations(dtype: torch.dtype) -> None:
    block = Block()
    block.arguments[:2] = [a.to(dtype) for a in block.arguments[:2]]
    block()
    block.check()
    assert block()[0].dtype == dtype


@pytest.mark.parametrize("shape", [(0, 40), (1, 40), (2, 1, 3, 40)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    block = Block()
    block()
    block.arguments[:2] = [torch.ones(shape), torch.ones(*shape[:-1], 24)]
    block.check()
    assert block()[2].shape == (*shape[:-1], 3, 8)


def test_a_gate_and_a_gain_that_is_computed() -> None:
    x, prologue = make("silu_mul", 40, 3)
    assert prologue.gate is not None
    arguments = [x, prologue.gate, torch.rand(24) + 0.5]
    gated = step_of(Case(x, prologue, [make_linear(24, 40)]), arguments, x=0, gate=1)
    _, norm = make("rms_norm", 24, 3)
    normed = step_of(Case(torch.ones(3, 24), norm, [make_linear(5, 24)]), arguments, x=3)
    routine = Routine(3, (4,), (gated, dataclasses.replace(normed, gain=2, shift=None)))
    text = routine.text()
    program = Program(lambda *a: BWLA.routine1([a[0], a[1], 1 + a[2]], [], text), {})
    want = routine.run([x, prologue.gate, 1 + arguments[2]], lambda place: arguments[int(place[1:])])[0]
    for _ in range(3):
        assert torch.equal(program(*arguments), want)
    arguments[2].mul_(2)
    assert not torch.equal(program(*arguments), want)


def test_weights_of_the_graphs_module() -> None:
    arguments: list[Tensor] = []
    x, prologue = make("rms_norm", 40, 3)
    step = step_of(Case(x, prologue, [make_linear(9, 40)]), arguments, x=0)
    named = {f"0.weight{i}": weight for i, weight in enumerate(arguments)}
    text = Routine(1, (1,), (step,)).text().replace("@", "=0.weight")
    program = Program(lambda x: BWLA.routine1([x], [], text), named)
    for _ in range(2):
        assert torch.equal(program(x), Case(x, prologue, [make_linear(9, 40)]).run()[0])


def test_gradients_are_refused_when_they_are_asked_for() -> None:
    block = Block()
    block()
    block.arguments[0].requires_grad_()
    y = block()[0]
    with pytest.raises(GradientError, match="no_grad"):
        y.sum().backward()


def test_bound_routines_go_with_their_program(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = native.operators()
    assert installed is not None
    freed: list[int] = []
    free = installed.free_bound
    monkeypatch.setattr(installed, "free_bound", lambda handle: (freed.append(handle), free(handle)))
    block = Block()
    block.arguments = [a.clone() for a in block.arguments]  # that nothing else holds
    block()
    (bound,) = block.program._table.bounds.values()
    handle = bound._handle
    del bound
    block.arguments[3] = block.arguments[3].clone()  # the weight dies, and what was bound to it with it
    assert handle in freed
    block()
    (handle,) = (bound._handle for bound in block.program._table.bounds.values())
    freed.clear()  # an address that was freed may be this one's
    block()
    assert handle not in freed
    block.program = Program(block.call, {})
    assert handle in freed


def test_models_that_take_turns_stay_bound(runs: list[Routine]) -> None:
    """Blocks that are compiled one by one share a compiled graph."""
    block, other = Block(), Block()
    other.arguments[2:] = [a.flip(0).clone() for a in other.arguments[2:]]
    for _ in range(3):
        for arguments in (block.arguments, other.arguments):
            block.program(*arguments)
    assert len(runs) == 2


def test_data_that_moves_and_comes_back_to_its_address_is_read_anew() -> None:
    block = Block()
    block()
    for i in range(2, len(block.arguments)):
        weight = block.arguments[i]
        if weight.numel() > 1:
            for _ in range(2):
                weight.data = weight.data.roll(1)  # the second may lie where the first one was
            clones = [a.clone() for a in block.arguments]
            want = block.routine.run(clones[:2], lambda place, clones=clones: clones[int(place[1:])])  # type: ignore[misc]
            assert all(torch.equal(y, w) for y, w in zip(block(), want, strict=True)), f"argument {i}"


def test_a_graph_without_routines_asks_nothing_of_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU machine the operators for the CPU are not built for it."""
    monkeypatch.setattr(native, "operators", lambda: pytest.fail("built"))
    program = Program(lambda x: x + 1, {})
    for _ in range(2):
        assert torch.equal(program(torch.ones(2)), torch.full((2,), 2.0))
    assert program._table == Table()


def test_shapes_are_known_without_values() -> None:
    block = Block()
    found = block.routine.empty([a.to("meta") for a in block.arguments[:2]])
    assert [y.shape for y in found] == [y.shape for y in block()]
    assert all(y.is_meta for y in found)


_places = st.none() | st.integers(0, 9) | st.integers(0, 999).map("@{}".format) | st.sampled_from(["=0.a", "=m.w"])
_weights = st.none() | st.integers(0, 999).map("@{}".format) | st.sampled_from(["=0.a", "=layers.3.weight"])


def _tuples(strategy: Any, n: int) -> Any:
    return st.lists(strategy, min_size=n, max_size=n).map(tuple)


_steps = st.builds(
    Step, st.sampled_from(["none", "rms_norm", "silu_mul"]), st.floats(0, 1), st.integers(2, 16), st.integers(1, 99),
    st.integers(1, 9), st.integers(0, 9), st.none() | st.integers(0, 9), _places, _places, _tuples(_weights, 8),
    st.lists(st.builds(Member, st.integers(1, 99), _tuples(_weights, 8), st.none() | st.integers(0, 9))).map(tuple),
    _tuples(st.integers(0, 99), 2),
)  # fmt: skip


_rows = st.builds(Rows, st.integers(0, 9), st.integers(0, 99), st.integers(1, 9), st.integers(1, 99))
_attentions = st.builds(Attention, st.floats(0, 1), _tuples(_rows, 3), _tuples(st.none() | st.integers(0, 9), 9))


@given(
    st.builds(
        Routine,
        st.integers(1, 5),
        st.lists(st.integers(0, 9), min_size=1).map(tuple),
        st.lists(_steps | _attentions, min_size=1).map(tuple),
        st.integers(0, 5),
    )
)
@settings(deadline=None, max_examples=60)
def test_text_says_all(routine: Routine) -> None:
    assert parsed(routine.text()) == routine


class Attending:
    """Query, key and value of one linear's result, attention to a cache, and a linear of what it reads."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(7)
        x, first = make("rms_norm", 24, 1)
        angles = torch.randn(1, 1, 8, generator=g)
        self.inputs = [x.view(1, 1, 24), angles.cos(), angles.sin(), torch.tensor(3), torch.ones(1, 1, 1, 9).bool()]
        self.caches = [torch.randn(1, 2, 9, 8, generator=g) for _ in range(2)]
        self.weights: list[Tensor] = [*self.inputs, *self.caches]
        before = step_of(Case(self.inputs[0], first, [make_linear(64, 24)]), self.weights, x=0)
        rows = (Rows(7, 0, 4, 8), Rows(7, 32, 2, 8), Rows(7, 48, 2, 8))
        attention = Attention(0.3, rows, (1, 2, 5, 6, 3, 4, None, None, None))
        y, second = make("none", 32, 1)
        after = step_of(Case(y.view(1, 1, 32), second, [make_linear(5, 32)]), self.weights, x=8)
        self.routine = Routine(7, (9,), (before, attention, after), n_caches=2)
        self.program = Program(self.call, {})

    def call(self, *arguments: Tensor) -> Tensor:
        y: Tensor = BWLA.routine1(list(arguments[:5]), list(arguments[5:7]), self.routine.text())
        return y


def test_attention_to_a_cache_is_a_step(runs: list[Routine]) -> None:
    case, by_python = Attending(), Attending()
    for i in range(4):
        for one in (case, by_python):
            one.inputs[3].fill_(3 + i)
        found = case.program(*case.weights)
        (wanted,) = by_python.routine.run(by_python.weights[:7], lambda place: by_python.weights[int(place[1:])])
        assert torch.equal(found, wanted)
        assert all(torch.equal(a, b) for a, b in zip(case.caches, by_python.caches, strict=True))
    assert runs.count(case.routine) == 4 + 1  # of which one was the program's


def test_a_full_cache_has_the_words_of_the_call() -> None:
    case = Attending()
    case.program(*case.weights)
    case.inputs[3].fill_(9)
    with pytest.raises(ShapeError, match="do not fit a cache of 9"):
        case.program(*case.weights)


def test_a_value_is_dropped_when_nothing_reads_it_any_more() -> None:
    case = Attending()
    assert case.routine.last_reads == ((0,), (7, 1, 2, 5, 6, 3, 4), (8,))
    assert Block().routine.last_reads == ((0, 1), (), (3,))  # 2 is read by the second step, and given back


def test_numbers_that_end_too_early_are_refused() -> None:
    installed = native.operators()
    assert installed is not None
    program = installed.new_bound()
    begun = [1, 1, 1, 1, 0]  # one input, one output, which is value 1, one step, behind which no value is dropped
    unknown, cut, attention = [99, 6, 40, 1, -1, -1, 0, 0], [0, 6, 40, 1, -1, -1, 0, 0], [-1, 0, 0, 1, 8]
    for words in ([], [1], begun[:4], begun, *([*begun, *step] for step in (unknown, cut, attention))):
        assert not installed.bind(program, "text", array("q", words), array("d", [0.0]), array("Q"))
    installed.free_bound(program)


def test_there_is_an_operator_for_each_number_of_results() -> None:
    assert all(hasattr(BWLA, f"routine{n}") for n in ROUTINE_RESULTS)

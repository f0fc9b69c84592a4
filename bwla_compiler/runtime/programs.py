"""Programs: what a compiled graph's routines read their weights from, and what C++ has bound of them.

Calling a program makes it the thread's own while the graph runs. A routine that C++ has not bound yet is run by Python,
which then has it bound to the weights of this call; from the next call on, C++ looks whether each of them is still that
tensor, unedited, before it runs. Weights that are other tensors than before are bound anew.
"""

import functools
import threading
import weakref
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from torch import Tensor

from bwla_compiler.errors import BwlaError
from bwla_compiler.runtime import anchors, native
from bwla_compiler.runtime.routines import Attention, Place, Routine, one_or_all, parsed
from bwla_compiler.spec import PROLOGUES

MOST_BOUND = 256
"""Sets of weights that one program keeps bound: blocks that were compiled one by one share a program."""


class Bound:
    """Routines that C++ has bound to one set of weights; it drops them when nothing refers to this any more.

    It belongs to the call that made it until `share`, when every weight that its routines read is known.
    """

    def __init__(self, library: native.NativeOperators) -> None:
        self._library = library
        self._handle = library.new_bound()
        self._lock = threading.Lock()
        self._shared = False
        self._texts: set[str] = set()
        self.positions: dict[int, None] = {}
        """Where weights stand among the arguments, in the order in which they were bound."""
        self.owners: list[weakref.ref[Any]] = []
        """To those weights, each with what is to happen when it dies."""

    def __del__(self) -> None:
        self._library.free_bound(self._handle)

    def share(self) -> bool:
        """Let other calls use what is bound, and return whether there is any; only that is bound anew from now on."""
        self._shared = True
        return bool(self._texts)

    def enter(self, bound: "Bound | None") -> int | None:
        """Make these routines, or none, those that C++ runs on this thread; return whose it ran before."""
        return self._library.enter_bound(None if bound is None else bound._handle)

    def leave(self, before: int | None) -> None:
        """Undo `enter`."""
        self._library.enter_bound(before)

    def bind(self, text: str, routine: Routine, frame: "Frame") -> None:
        """Have C++ bind a routine to the weights of a call, if it can."""
        with self._lock:
            if self._shared and text not in self._texts:
                return
            words, eps = _numbers(routine)
            weights = array("Q", (frame.weight(place)._cdata for place in routine.weights))
            if self._library.bind(self._handle, text, words, eps, weights):
                self._texts.add(text)
                self.positions.update((_position(place), None) for place in routine.weights if place[0] == "@")


@dataclass(frozen=True)
class Table:
    """What is bound, by the ids of the weights. positions: of those among the arguments."""

    positions: tuple[int, ...] = ()
    bounds: dict[tuple[int, ...], Bound] = field(default_factory=dict)

    @functools.cached_property
    def _pick(self) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        if not self.positions:
            return lambda arguments: ()
        return itemgetter(*self.positions, self.positions[0])  # it gives a tuple for two and more alone

    def key(self, arguments: Sequence[Any], replaced: int) -> tuple[int, ...]:
        """Return the ids of the weights among the arguments, behind how many of other modules were replaced until then.

        An id that a dead tensor had may be another's now: C++ finds its weight gone, and the routine is bound anew.
        """
        return replaced, *map(id, self._pick(arguments))


@dataclass
class Frame:
    """One call of a program. bound: made when the first routine is. replaced: `anchors.REPLACED` when it began."""

    program: "Program"
    arguments: Sequence[Any]
    bound: Bound | None
    replaced: int
    is_checked: bool = False

    def check(self) -> None:
        """Raise ShapeError where modules hold tensors of other shapes than the graph was compiled for."""
        if not self.is_checked:
            self.program.check(self.arguments)
            self.is_checked = True

    def weight(self, place: str) -> Tensor:
        """Return a weight by its place in a routine. Raises BwlaError where it is none any more."""
        if place[0] == "@":
            found, _, name = self.arguments[_position(place)], *place.partition(".")[1:]
            found = anchors.part_of(found, name) if name else found
        else:
            found = self.program.tensors[place[1:]]
        if not isinstance(found, Tensor):
            raise BwlaError(
                f"a weight of compiled code is {found} by now: call torch._dynamo.reset() after such an edit"
            )
        return found


class _Running(threading.local):
    """The call that this thread is in."""

    frame: Frame | None = None


_RUNNING = _Running()


class Program:
    """A compiled graph that may hold routines, as a function of the graph's arguments.

    run: the graph, compiled. tensors: those of its module, which it reads beside its arguments, by name. facts: of
    the modules whose anchors are among the arguments, by number; modules of others are refused.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        tensors: Mapping[str, Tensor],
        *,
        facts: Mapping[int, str] | None = None,
    ) -> None:
        self._run, self.tensors = run, tensors
        self._facts = facts or {}
        self._table = Table()  # replaced as one, for threads
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        """Run the graph. Raises ShapeError where modules hold tensors of other shapes than it was compiled for."""
        table, replaced = self._table, anchors.REPLACED
        bound = table.bounds.get(table.key(arguments, replaced))
        outer = _RUNNING.frame
        entered = bound or (outer.bound if outer is not None else None)  # an outer program's routines are not ours
        frame = Frame(self, arguments, bound, replaced)
        before = None
        try:
            _RUNNING.frame = frame
            before = None if entered is None else entered.enter(bound)
            results = self._run(*arguments)
        finally:
            _RUNNING.frame = outer
            if entered is not None:
                entered.leave(before)
        if frame.bound is not None and frame.bound is not bound and frame.bound.share():
            self._keep(frame)
        return results

    def check(self, arguments: Sequence[Any]) -> None:
        """Raise ShapeError where modules hold tensors of other shapes than the graph was compiled for."""
        for i, facts in self._facts.items():
            anchors.check_parts(arguments[i], facts)

    def _keep(self, frame: Frame) -> None:
        """Use what a call has bound whenever these weights come again, as long as they live."""
        bound, arguments = frame.bound, frame.arguments
        assert bound is not None
        with self._lock:
            if self._table.positions != tuple(bound.positions):
                self._table = Table(tuple(bound.positions))
            table = self._table
            for key in [key for key in table.bounds if key[0] < frame.replaced]:
                table.bounds.pop(key, None)  # that number never comes again
            while len(table.bounds) >= MOST_BOUND:
                table.bounds.pop(next(iter(table.bounds)), None)
            key = table.key(arguments, frame.replaced)
            dead = functools.partial(_drop, weakref.ref(self), key)
            bound.owners = [weakref.ref(arguments[position], dead) for position in table.positions]
            table.bounds[key] = bound


def _drop(program: "weakref.ref[Program]", key: tuple[int, ...], dead: object) -> None:
    """Let go of what was bound to a weight that died."""
    if (found := program()) is not None:
        found._table.bounds.pop(key, None)


def run_routine(inputs: list[Tensor], caches: list[Tensor], text: str) -> Tensor | tuple[Tensor, ...]:
    """Implementation of bwla::routine1, 2, .. where C++ has not bound it: run it, and have it bound.

    Raises BwlaError outside of the compiled graph that it belongs to.
    """
    frame = _RUNNING.frame
    if frame is None:
        raise BwlaError("a routine runs inside its compiled graph alone: call what torch.compile returned")
    frame.check()
    routine = parsed(text)
    results = routine.run([*inputs, *caches], frame.weight)
    if frame.bound is None and native.wanted() and (library := native.operators()) is not None:
        frame.bound = Bound(library)
    if frame.bound is not None:
        frame.bound.bind(text, routine, frame)
    return one_or_all(results)


def _position(place: str) -> int:
    """Return which argument a place "@3" or "@3.NAME" speaks of."""
    return int(place[1:].partition(".")[0])


def _numbers(routine: Routine) -> tuple["array[int]", "array[float]"]:
    """Return a routine as numbers, and eps or scale of its steps, for C++ to read in turn; -1 stands for none."""
    index = {place: i for i, place in enumerate(routine.weights)}

    def weight(place: Place) -> int:
        return index[place] if isinstance(place, str) else -1

    def value(place: Place) -> int:
        return place if isinstance(place, int) else -1

    words = array("q", (routine.n_inputs, len(routine.outputs), *routine.outputs, len(routine.steps)))
    for step, dead in zip(routine.steps, routine.last_reads, strict=True):
        words.extend((len(dead), *dead))
        if isinstance(step, Attention):
            words.append(-1)
            for rows in step.rows:
                words.extend((rows.place, rows.first, rows.heads, rows.size))
            words.extend(map(value, step.values))
            continue
        words.extend((PROLOGUES.index(step.kind), step.bits, step.columns, step.heads, *step.first, len(step.members)))
        words.extend(map(value, (step.x, step.gate, step.gain, step.shift)))
        words.extend(map(weight, (step.gain, step.shift, *step.weights)))
        for member in step.members:
            words.extend((*map(weight, member.weights), value(member.residual)))
    return words, array("d", (step.scale if isinstance(step, Attention) else step.eps for step in routine.steps))

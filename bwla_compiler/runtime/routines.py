"""Routines: calls of a compiled graph in a row, as text that holds all but the values.

A routine takes activations and caches, and names its weights by where the graph's program finds them (see `programs`),
so that a step hands over a few tensors where the calls read a thousand. Its text is what the graph holds: it stands in
Inductor's caches, and means the same in the next process.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bwla_compiler.runtime.rows import empty_result

Place = int | str | None
"""A value by number, inputs first, then results in order; a weight: "@3", argument of the graph, "@3.NAME", tensor of
the module that this argument is the anchor of, or "=NAME", tensor of the graph's module; or none."""

Weights = Callable[[str], Tensor]

Get = Callable[[Place], Tensor | None]

ALL = -1
"""In place of a first channel: all of a value's."""

_NONE = "-"


@dataclass(frozen=True)
class Member:
    """One linear of a step. weights: signs, scale, low rank (3), bias, exponents of scale and low rank."""

    out_features: int
    weights: tuple[Place, ...]
    residual: Place


@dataclass(frozen=True)
class Step:
    """One bwla::fused_group; or, without members, one bwla::prologue of `heads` times `columns` channels, or, of kind
    "none", one bwla::transform.

    x, gate: values, of which it reads channels from `first` on, ALL: the value is as wide. gain, shift: weights, or
    values that the graph computes of them. weights: transform (3), its exponents (3), column scale, its exponent.
    """

    kind: str
    eps: float
    bits: int
    columns: int
    heads: int
    x: Place
    gate: Place
    gain: Place
    shift: Place
    weights: tuple[Place, ...]
    members: tuple[Member, ...]
    first: tuple[int, int] = (ALL, ALL)

    @property
    def places(self) -> tuple[Place, ...]:
        """Of all that it reads."""
        members = (place for member in self.members for place in (*member.weights, member.residual))
        return (self.x, self.gate, self.gain, self.shift, *self.weights, *members)

    def run(self, get: Get) -> list[Tensor]:
        """Return its results. get: a tensor by its place."""
        gain, shift = get(self.gain), get(self.shift)
        x, gate = (
            self._channels(get(place), first) for place, first in zip((self.x, self.gate), self.first, strict=True)
        )
        assert x is not None
        *transform, column_scale, column_exponent = map(get, self.weights)
        if not self.members and self.kind == "none":
            return [torch.ops.bwla.transform.default(x, *transform)]
        if not self.members:
            return [torch.ops.bwla.prologue.default(self._by_head(x), self.kind, self.eps, gain, shift)]
        members = [[*map(get, member.weights), get(member.residual)] for member in self.members]
        signs, scale, rank_in, rank_out, rank_scale, bias, exponent, rank_exponent, residual = map(
            list, zip(*members, strict=True)
        )
        linears = (signs, scale, column_scale, rank_in, rank_out, rank_scale, bias, residual, self.bits)
        before = (x, gate, self.kind, self.eps, gain, shift, *transform)
        results: list[Tensor] = torch.ops.bwla.fused_group.default(
            *before, *linears, exponent, column_exponent, rank_exponent
        )
        return results

    def empty(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors like its results."""
        assert isinstance(self.x, int)
        x = self._channels(values[self.x], self.first[0])
        assert x is not None
        results = [empty_result(x, member.out_features) for member in self.members]
        return results or [self._by_head(x.new_empty(x.shape))]

    def words(self) -> Iterator[Any]:
        """Yield what its text holds."""
        yield from (self.kind, self.eps, self.bits, self.columns, self.heads, *self.first)
        yield from (self.x, self.gate, self.gain, self.shift, *self.weights)
        for member in self.members:
            yield from (member.out_features, *member.weights, member.residual)

    @classmethod
    def of_words(cls, words: Sequence[str]) -> "Step":
        """Return the step that has these words."""
        kind, eps, bits, columns, heads, first, gate_first, *rest = words
        x, gate, gain, shift, *places = map(_place, rest)
        weights, parts = tuple(places[:_N_WEIGHTS]), places[_N_WEIGHTS:]
        members = tuple(
            Member(out, tuple(parts[i + 1 : i + _N_MEMBER - 1]), parts[i + _N_MEMBER - 1])
            for i in range(0, len(parts), _N_MEMBER)
            if isinstance(out := parts[i], int)
        )
        sizes = int(bits), int(columns), int(heads)
        begins = int(first), int(gate_first)
        return cls(kind, float(eps), *sizes, x, gate, gain, shift, weights, members, begins)

    def _channels(self, x: Tensor | None, first: int) -> Tensor | None:
        """Return the channels of a value that the step reads."""
        return x if x is None or first == ALL else x.narrow(-1, first, self.heads * self.columns)

    def _by_head(self, x: Tensor) -> Tensor:
        """Return [..., heads * columns] as [..., heads, columns]."""
        return x if self.heads == 1 else x.view(*x.shape[:-1], self.heads, self.columns)


@dataclass(frozen=True)
class Rows:
    """Channels of a value: `heads` times `size` of them from `first` on, as the operands of attention."""

    place: int
    first: int
    heads: int
    size: int

    def of(self, x: Tensor) -> Tensor:
        """Return them [batch, tokens, heads, size], of x [batch, tokens, channels] or with heads apart already."""
        wide = x.flatten(2) if x.dim() > 3 else x
        chosen = wide.narrow(2, self.first, self.heads * self.size)
        return chosen.view(*chosen.shape[:2], self.heads, self.size)


@dataclass(frozen=True)
class Attention:
    """One bwla::cached_attention. rows: query, key, value. values: its other tensors, in its order, by number."""

    scale: float
    rows: tuple[Rows, ...]
    values: tuple[Place, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """Of all that it reads."""
        return (*(rows.place for rows in self.rows), *self.values)

    def run(self, get: Get) -> list[Tensor]:
        """Return its result. get: a tensor by its place."""
        rows = []
        for one in self.rows:
            x = get(one.place)
            assert x is not None
            rows.append(one.of(x))
        *before, key_scale, value_scale, scale_start = map(get, self.values)
        return [
            torch.ops.bwla.cached_attention.default(*rows, *before, self.scale, key_scale, value_scale, scale_start)
        ]

    def empty(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return a tensor like its result."""
        query = self.rows[0]
        x = values[query.place]
        return [x.new_empty(*x.shape[:2], query.heads * query.size)]

    def words(self) -> Iterator[Any]:
        """Yield what its text holds."""
        yield from (ATTENTION, self.scale)
        for rows in self.rows:
            yield from (rows.place, rows.first, rows.heads, rows.size)
        yield from self.values

    @classmethod
    def of_words(cls, words: Sequence[str]) -> "Attention":
        """Return the step that has these words."""
        _, scale, *rest = words
        rows = tuple(Rows(*map(int, rest[i : i + 4])) for i in range(0, 12, 4))
        return cls(float(scale), rows, tuple(map(_place, rest[12:])))


ATTENTION = "attention"
"""The first word of an attention; that of other steps is their prologue."""


@dataclass(frozen=True)
class Routine:
    """Steps in a row. outputs: numbers of the values that it returns. n_caches: of the inputs, the last, are edited."""

    n_inputs: int
    outputs: tuple[int, ...]
    steps: tuple[Step | Attention, ...]
    n_caches: int = 0

    @functools.cached_property
    def weights(self) -> tuple[str, ...]:
        """Every weight's place, once."""
        return tuple(dict.fromkeys(place for step in self.steps for place in step.places if isinstance(place, str)))

    @functools.cached_property
    def last_reads(self) -> tuple[tuple[int, ...], ...]:
        """The values that nothing reads after each step: many tokens of many layers would not fit the memory."""
        last = {place: i for i, step in enumerate(self.steps) for place in step.places if isinstance(place, int)}
        kept = {place: i for place, i in last.items() if place not in self.outputs}
        return tuple(tuple(place for place, at in kept.items() if at == i) for i in range(len(self.steps)))

    def run(self, inputs: Sequence[Tensor], weights: Weights) -> list[Tensor]:
        """Return the outputs, by the operators that the steps stand for."""
        values: dict[int, Tensor] = dict(enumerate(inputs))

        def get(place: Place) -> Tensor | None:
            return None if place is None else values[place] if isinstance(place, int) else weights(place)

        made = len(values)
        for step, dead in zip(self.steps, self.last_reads, strict=True):
            for result in step.run(get):
                values[made] = result
                made += 1
            for place in dead:
                del values[place]
        return [values[i] for i in self.outputs]

    def empty(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors like the outputs."""
        values = list(inputs)
        for step in self.steps:
            values += step.empty(values)
        return [values[i] for i in self.outputs]

    def text(self) -> str:
        """Return what `parsed` reads."""
        lines = [" ".join(map(str, (self.n_inputs, self.n_caches, *self.outputs)))]
        lines += [" ".join(_NONE if word is None else str(word) for word in step.words()) for step in self.steps]
        return "\n".join(lines)


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> Routine:
    """Return the routine that has this text."""
    first, *lines = text.split("\n")
    n_inputs, n_caches, *outputs = map(int, first.split())
    words = [line.split(" ") for line in lines]
    steps = tuple((Attention if one[0] == ATTENTION else Step).of_words(one) for one in words)
    return Routine(n_inputs, tuple(outputs), steps, n_caches)


def one_or_all(results: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Return results as an operator with so many of them returns them."""
    return results[0] if len(results) == 1 else tuple(results)


_N_WEIGHTS, _N_MEMBER = 8, 10


def _place(word: str) -> Place:
    return None if word == _NONE else word if word[0] in "@=" else int(word)

"""Routines: calls of a compiled graph in a row, as text that holds all but the values.

A routine takes activations, and names its weights by where the graph's program finds them (see `programs`), so that a
step hands over two or three tensors where the calls read a hundred. Its text is what the graph holds: it stands in
Inductor's caches, and means the same in the next process.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bwla_compiler.runtime.rows import empty_result

Place = int | str | None
"""A value by number, inputs first, then results in order; a weight: "@3", argument of the graph, or "=NAME", tensor of
its module; or none."""

Weights = Callable[[str], Tensor]

_NONE = "-"


@dataclass(frozen=True)
class Member:
    """One linear of a step. weights: signs, scale, low rank (3), bias, exponents of scale and low rank."""

    out_features: int
    weights: tuple[Place, ...]
    residual: Place


@dataclass(frozen=True)
class Step:
    """One bwla::fused_group; or, without members, one bwla::prologue of `heads` times `columns` channels.

    x, gate: values. gain, shift: weights, or values that the graph computes of them. weights: transform (3), its
    exponents (3), column scale, its exponent.
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

    @property
    def read(self) -> list[str]:
        """Weights by place."""
        places = [self.gain, self.shift, *self.weights, *(place for member in self.members for place in member.weights)]
        return [place for place in places if isinstance(place, str)]


@dataclass(frozen=True)
class Routine:
    """Steps in a row. outputs: numbers of the values that it returns."""

    n_inputs: int
    outputs: tuple[int, ...]
    steps: tuple[Step, ...]

    @functools.cached_property
    def weights(self) -> tuple[str, ...]:
        """Every weight's place, once."""
        return tuple(dict.fromkeys(place for step in self.steps for place in step.read))

    def run(self, inputs: Sequence[Tensor], weights: Weights) -> list[Tensor]:
        """Return the outputs, by the operators that the steps stand for."""
        values = list(inputs)
        for step in self.steps:
            values += _results(step, values, weights)
        return [values[i] for i in self.outputs]

    def empty(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors like the outputs."""
        values = list(inputs)
        for step in self.steps:
            assert isinstance(step.x, int)
            x = values[step.x]
            values += [empty_result(x, member.out_features) for member in step.members]
            if not step.members:
                values.append(_by_head(x.new_empty(x.shape), step))
        return [values[i] for i in self.outputs]

    def text(self) -> str:
        """Return what `parsed` reads."""
        lines = [" ".join(map(str, (self.n_inputs, *self.outputs)))]
        for step in self.steps:
            words: list[Any] = [step.kind, step.eps, step.bits, step.columns, step.heads]
            words += [step.x, step.gate, step.gain, step.shift, *step.weights]
            for member in step.members:
                words += [member.out_features, *member.weights, member.residual]
            lines.append(" ".join(_NONE if word is None else str(word) for word in words))
        return "\n".join(lines)


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> Routine:
    """Return the routine that has this text."""
    first, *lines = text.split("\n")
    n_inputs, *outputs = map(int, first.split())
    return Routine(n_inputs, tuple(outputs), tuple(map(_step, lines)))


def one_or_all(results: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Return results as an operator with so many of them returns them."""
    return results[0] if len(results) == 1 else tuple(results)


_N_WEIGHTS, _N_MEMBER = 8, 10


def _step(line: str) -> Step:
    kind, eps, bits, columns, heads, *rest = line.split(" ")
    x, gate, gain, shift, *places = map(_place, rest)
    weights, parts = tuple(places[:_N_WEIGHTS]), places[_N_WEIGHTS:]
    members = tuple(
        Member(out, tuple(parts[i + 1 : i + _N_MEMBER - 1]), parts[i + _N_MEMBER - 1])
        for i in range(0, len(parts), _N_MEMBER)
        if isinstance(out := parts[i], int)
    )
    return Step(kind, float(eps), int(bits), int(columns), int(heads), x, gate, gain, shift, weights, members)


def _place(word: str) -> Place:
    return None if word == _NONE else word if word[0] in "@=" else int(word)


def _by_head(x: Tensor, step: Step) -> Tensor:
    """Return [..., heads * columns] as [..., heads, columns]."""
    return x if step.heads == 1 else x.view(*x.shape[:-1], step.heads, step.columns)


def _results(step: Step, values: Sequence[Tensor], weights: Weights) -> list[Tensor]:
    def get(place: Place) -> Tensor | None:
        return None if place is None else values[place] if isinstance(place, int) else weights(place)

    x = get(step.x)
    assert x is not None
    gain, shift = get(step.gain), get(step.shift)
    if not step.members:
        return [torch.ops.bwla.prologue.default(_by_head(x, step), step.kind, step.eps, gain, shift)]
    *transform, column_scale, column_exponent = map(get, step.weights)
    members = [[*map(get, member.weights), get(member.residual)] for member in step.members]
    signs, scale, rank_in, rank_out, rank_scale, bias, exponent, rank_exponent, residual = map(
        list, zip(*members, strict=True)
    )
    linears = (signs, scale, column_scale, rank_in, rank_out, rank_scale, bias, residual, step.bits)
    before = (x, get(step.gate), step.kind, step.eps, gain, shift, *transform)
    results: list[Tensor] = torch.ops.bwla.fused_group.default(
        *before, *linears, exponent, column_exponent, rank_exponent
    )
    return results

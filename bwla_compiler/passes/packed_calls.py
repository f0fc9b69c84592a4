"""Packed linears of a graph as data: operands, the transform before them, and where their results go."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from bwla_compiler.passes.match_graph import TARGETS, dtype_of, is_cast, uncast, widened_from
from bwla_compiler.passes.match_prologue import same_shape
from bwla_compiler.runtime.ops import LIBRARY

OPS: Any = getattr(torch.ops, LIBRARY.ns)
PART = OPS.part.default
"""One tensor of a module that an anchor stands for (see `runtime.anchors`)."""
_LINEAR = OPS.linear.default
_TRANSFORM = OPS.transform.default
_N_LINEAR, _N_TRANSFORM = 12, 7  # operands of each, exponents last
NO_TRANSFORM = (None,) * (_N_TRANSFORM - 1)


@dataclass(frozen=True)
class Packed:
    """One bwla.linear: all its operands by position, and what its transform (if any) reads and multiplies with."""

    node: Node
    operands: tuple[Any, ...]
    read: Node
    transform: tuple[Any, ...]

    @property
    def source(self) -> Node:
        """What is read, before it was widened to float32."""
        return widened_from(self.read)

    @property
    def is_anchored(self) -> bool:
        """Whether its tensors are named by an anchor, which routines alone can find."""
        return bool(self.operands[1].target is PART)

    @property
    def shared(self) -> tuple[Any, ...]:
        """What linears must have in common to be rounded together."""
        column_scale, bits, column_exponent = self.operands[3], self.operands[8], self.operands[10]
        return (
            self.source,
            dtype_of(self.read),
            self.transform,
            column_scale,
            column_exponent,
            bits,
            dtype_of(self.node),
        )


def find_packed(graph: Graph) -> Iterator[Packed]:
    """Yield every packed linear of a graph, in order."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _LINEAR:
            operands = (*node.args, *(None,) * (_N_LINEAR - len(node.args)))
            read = operands[0]
            transform = NO_TRANSFORM
            if read.target is _TRANSFORM:
                transform = (*read.args[1:], *(None,) * (_N_TRANSFORM - len(read.args)))
                read = read.args[0]
            yield Packed(node, operands, read, transform)


def foreign_reader(source: Node) -> Node | None:
    """Return a node that reads this value, directly or converted or transformed, and is no packed linear; else None."""
    frontier: list[Node] = [uncast(source)]
    while frontier:
        for user in frontier.pop().users:
            if is_cast(user) or user.target is _TRANSFORM:
                frontier.append(user)
            elif user.target is not _LINEAR:
                return user
    return None


def results_as(linear: Node, dtype: torch.dtype | None) -> list[Node]:
    """Return the nodes that hold a linear's result in this dtype; none where it is read in another."""
    if dtype_of(linear) == dtype:
        return [linear]
    casts = list(linear.users)
    return casts if all(is_cast(user) and dtype_of(user) == dtype for user in casts) else []


def residual_of(result: Node) -> tuple[Node, Node] | None:
    """Return (sum, addend) where a result is only read to be added to a tensor of its shape and dtype, else None."""
    if len(result.users) != 1:
        return None
    (total,) = result.users
    if total.target not in TARGETS["add"] or total.kwargs or len(total.args) != 2:
        return None
    addend = total.args[1] if total.args[0] is result else total.args[0]
    if not isinstance(addend, Node) or addend is result or not same_shape(addend, result):
        return None
    return (total, addend) if dtype_of(addend) == dtype_of(result) == dtype_of(total) else None

"""Lanes: heads stored as [.., lanes, size], where query, key and value are taken by number from one axis.

Read as heads, lanes and channels of a product, the three would share a basis, and a rotary embedding on two of them
would pin the third. An axis of lanes is a direct sum instead, each lane with a space of its own.
"""

from typing import Any

from torch.fx import Node

from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.analysis import Analysis, Value, argument
from bwla_compiler.graph.spaces import Space, compound, pinned, unify


def lanes_of(a: Analysis, node: Any, axes: list[Space]) -> Value | None:
    """Return the value of a view [.., lanes, size] whose readers all take lanes by number, or None.

    axes: of what is viewed. Its last axis becomes the product of what stands before the lanes with their direct sum.
    """
    sizes, axis = a.shape(node), axes[-1].find() if axes else pinned(0, "")
    n_kept = len(axes) - 1
    if len(sizes) < n_kept + 2 or axis.kind is not None or sizes[:n_kept] != [x.size for x in axes[:-1]]:
        return None
    *outer, n_lanes, size = sizes[n_kept:]
    if size == 1 or n_lanes < 2 or 1 in outer or not node.users:
        return None
    if any(_taken(a, user, node) is None for user in node.users):
        return None
    before, lanes = [Space(s) for s in outer], tuple(Space(size) for _ in range(n_lanes))
    unify(compound("product", [*before, compound("sum", lanes)]), axis, node.name)
    return Value([*axes[:-1], *before, pinned(n_lanes, f"{node.name}: lanes"), lanes[0]], lanes=lanes)


def _taken(a: Analysis, user: Any, source: Node) -> list[int] | None:
    """Return the numbers of the lanes that a slice, select or index takes of a view; None where it is none of these."""
    if not user.args or user.args[0] is not source or len(user.all_input_nodes) > 1 + (user.target in ops.INDEX):
        return None
    rank = len(a.shape(source))
    at, size = rank - 2, a.shape(source)[-2]
    if user.target in ops.SELECT and int(user.args[1]) % rank == at:
        return [int(user.args[2]) % size]
    if user.target in ops.SLICE and int(argument(user, 1, "dim", 0)) % rank == at:
        bounds = (argument(user, i, name) for i, name in ((2, "start"), (3, "end"), (4, "step")))
        return list(range(size))[slice(*bounds)] or None
    if user.target in ops.INDEX and [i for i, q in enumerate(user.args[1]) if q is not None] == [at]:
        index = a.number_of(user.args[1][at])
        return None if index is None else [int(i) % size for i in index.flatten()]
    return None


def take_lanes(a: Analysis, node: Any) -> bool:
    """Handle what takes lanes of a view that has them: those taken together share one space from here on."""
    value = a.value(node.args[0])
    if value is None or not value.lanes:
        return False
    taken = _taken(a, node, node.args[0])
    assert taken  # the view was given lanes because all its readers take some
    spaces = [value.lanes[i] for i in taken]
    for space in spaces[1:]:
        unify(spaces[0], space, node.name)
    first = len(value.axes) - 2
    rows = [pinned(s, f"{node.name}: lanes") for s in a.shape(node)[first:-1]]
    a.values[node] = Value([*value.axes[:first], *rows, spaces[0]])
    return True

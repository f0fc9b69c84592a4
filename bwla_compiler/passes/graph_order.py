"""Order in a graph: what depends on what, and moving readers behind a call that took the place of earlier ones."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch.fx import Graph, Node


def positions(graph: Graph) -> dict[Node, int]:
    """Return the place of every node."""
    return {node: i for i, node in enumerate(graph.nodes)}


def dependence(operands: Iterable[Node], members: set[Node], order: dict[Node, int]) -> tuple[Node, Node] | None:
    """Return (operand, member) where an operand is computed from a member, None where no operand is."""
    first = min(order[member] for member in members)
    for operand in operands:
        frontier, seen = [operand], {operand}
        while frontier:
            node = frontier.pop()
            if node in members:
                return operand, node
            new = [n for n in node.all_input_nodes if n not in seen and order[n] >= first]
            seen.update(new)
            frontier.extend(new)
    return None


def is_edit(node: Node) -> bool:
    """Whether a node edits a tensor in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def mutation_between(graph: Graph, first: Node, last: Node, *, but: Collection[Node] = ()) -> Node | None:
    """Return a node that edits a tensor in place between two nodes, past which no reader may be moved.

    but: nodes whose edits are known to matter to no reader.
    """
    node = first
    while node is not last:
        if is_edit(node) and node not in but:
            return node
        node = node.next
    return None


def sink_readers(graph: Graph, results: Sequence[Node]) -> None:
    """Restore topological order: nodes that read a result but stand before it move behind it, in their order."""
    order = positions(graph)
    after = results[-1]
    limit, moved = order[after], set(results)
    for node in list(graph.nodes):
        if order[node] > limit:
            break
        if node not in moved and any(source in moved for source in node.all_input_nodes):
            after.append(node)
            after = node
            moved.add(node)

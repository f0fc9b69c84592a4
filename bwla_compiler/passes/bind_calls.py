"""BindCalls: calls in a row that read each other's results become one routine, which names its weights in its text."""

import operator
from collections.abc import Sequence
from typing import Any, ClassVar

from torch.fx import Graph, Node

from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.graph_order import dependence, mutation_between, positions, sink_readers
from bwla_compiler.passes.packed_calls import OPS
from bwla_compiler.passes.routine_calls import (
    ATTENTION,
    GROUP,
    PROLOGUE,
    TRANSFORM,
    Call,
    activations,
    caches,
    has_known_inputs,
    needed,
    refusal,
    results,
    seen_through,
    source_of,
    step_of,
)
from bwla_compiler.runtime.routines import Place, Routine
from bwla_compiler.spec import ROUTINE_RESULTS


class BindCalls:
    """Make routines of the `bwla.fused_group` on the CPU, where a call costs as much as a small kernel.

    A norm by head of a routine's own result is taken in, and so are transforms, those before a head and behind an
    embedding too, and attention to a static cache: with it, all blocks of a step are one routine. Works in place on
    what Inductor is about to lower, whose inputs must be described by AOTAutograd: a weight that is no input of the
    graph leaves its call as it is.
    """

    name: ClassVar[str] = "bind-calls"

    def run(self, graph: Graph) -> PassReport:
        """Rewrite in place; the report lists each routine, and each call that cannot be in one.

        Nothing is done to a graph whose inputs are not those of its program, one by one and in order: a backward
        graph, or one of whose inputs AOTAutograd made another.
        """
        report = PassReport(self.name)
        if not has_known_inputs(graph):
            return report
        order, chain = positions(graph), list[Call]()
        for node in list(graph.nodes):
            if node.target not in (GROUP, PROLOGUE, TRANSFORM, ATTENTION):
                continue
            if chain and not refusal(node) and _joins(graph, chain, node, order):
                chain.append(node)
            elif node.target in (GROUP, TRANSFORM):
                if reason := refusal(node):
                    report.skip(node.name, reason)
                    continue
                _bind(graph, chain, report)
                order, chain = positions(graph), [node]
        _bind(graph, chain, report)
        graph.lint()
        return report


def _joins(graph: Graph, chain: Sequence[Call], call: Call, order: dict[Node, int]) -> bool:
    """Whether all that a call reads is there when a chain begins, or comes from the chain itself."""
    members = set(chain)
    outer = [value for value in activations(call) if source_of(value)[0] not in members]
    if any(value in outer for value in needed(call)):
        return False
    if dependence(outer, members, order) is not None:
        return False
    return mutation_between(graph, chain[0], call, but=members) is None


def _bind(graph: Graph, chain: Sequence[Call], report: PassReport) -> None:
    """Put one routine in the place of a chain, or of each half where it has more results than a routine may."""
    inside = _replaced(chain)
    made = [nodes for call in chain for nodes in results(call)]
    read = [any(user not in inside for node in nodes for user in node.users) for nodes in made]
    if sum(read) not in ROUTINE_RESULTS:
        if len(chain) > 1:
            half = len(chain) // 2
            _bind(graph, chain[:half], report)
            _bind(graph, chain[half:], report)
        elif chain:
            report.skip(chain[0].name, f"it has {sum(read)} results")
        return
    inputs, edited, routine = _routine(chain, [i for i, is_read in enumerate(read) if is_read])
    outputs = [nodes for nodes, is_read in zip(made, read, strict=True) if is_read]
    _replace(graph, chain, (inputs, edited, routine), outputs)
    report.changed.append((", ".join(call.name for call in chain), f"one routine of {len(routine.weights)} weights"))


def _replaced(chain: Sequence[Call]) -> set[Node]:
    """Return the calls of a chain with their results, and the views of these that only they read."""
    gone = set(chain) | {node for call in chain for nodes in results(call) for node in nodes}
    views = [view for call in chain for view in seen_through(call)]
    for view in views:  # each after those that are computed of it
        if gone.issuperset(view.users):
            gone.add(view)
    return gone


def _routine(chain: Sequence[Call], outputs: Sequence[int]) -> tuple[list[Node], list[Node], Routine]:
    """Return what the routine of a chain takes, what it edits, and the routine; outputs: results by number."""
    produced = [(call, i) for call in chain for i in range(len(results(call)))]
    read = [value for call in chain for value in activations(call)]
    inputs = list(dict.fromkeys(value for value in read if source_of(value) not in produced))
    edited = list(dict.fromkeys(cache for call in chain for cache in caches(call)))
    numbers: dict[Any, int] = {value: i for i, value in enumerate((*inputs, *edited))}
    first = len(numbers)
    numbers |= {result: first + i for i, result in enumerate(produced)}

    def number(value: Node | None) -> Place:
        return None if value is None else numbers[value] if value in numbers else numbers[source_of(value)]

    steps = tuple(step_of(call, number) for call in chain)
    return inputs, edited, Routine(first, tuple(first + i for i in outputs), steps, len(edited))


def _replace(
    graph: Graph, chain: Sequence[Call], made: tuple[list[Node], list[Node], Routine], outputs: Sequence[list[Node]]
) -> None:
    """Put a routine in, hand its results to the readers, and move those that stand before it behind it."""
    gone = _replaced(chain)
    inputs, edited, routine = made
    with graph.inserting_after(chain[-1]):
        call = graph.call_function(getattr(OPS, f"routine{len(outputs)}").default, (inputs, edited, routine.text()))
    new = [call]
    if len(outputs) > 1:
        for i in range(len(outputs)):
            with graph.inserting_after(new[-1]):
                new.append(graph.call_function(operator.getitem, (call, i)))
        call.meta["val"] = tuple(nodes[0].meta["val"] for nodes in outputs)
        del new[0]
    for nodes, result in zip(outputs, new, strict=True):
        result.meta = {"val": nodes[0].meta["val"]}
        for node in nodes:
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in gone)
    for node in reversed([node for node in graph.nodes if node in gone]):
        graph.erase_node(node)
    sink_readers(graph, new)

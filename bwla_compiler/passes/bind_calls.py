"""BindCalls: calls in a row that read each other's results become one routine, which names its weights in its text."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch._functorch._aot_autograd.descriptors import BufferAOTInput, ParamAOTInput, PlainAOTInput
from torch.fx import Graph, Node

from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.graph_order import dependence, mutation_between, positions, sink_readers
from bwla_compiler.passes.packed_calls import OPS
from bwla_compiler.runtime.routines import Member, Place, Routine, Step
from bwla_compiler.runtime.triton_layout import n_rows
from bwla_compiler.spec import FLOAT_BITS, ROUTINE_RESULTS

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default)
_GROUP, _PROLOGUE = OPS.fused_group.default, OPS.prologue.default

# Places among the operands of bwla::fused_group; see routines.Step and routines.Member for their order.
_GATE, _KIND, _EPS, _GAIN, _SHIFT, _SIGNS, _RESIDUAL, _BITS = 1, 2, 3, 4, 5, 12, 19, 20
_WEIGHTS, _MEMBER = (6, 7, 8, 9, 10, 11, 14, 22), (12, 13, 15, 16, 17, 18, 21, 23)

Call = Any
"""A Node that calls an operator of ours, whose operands have the types of its schema."""


class BindCalls:
    """Make routines of the `bwla.fused_group` on the CPU, where a call costs as much as a small kernel.

    A norm by head of a routine's own result is taken in. Works in place on what Inductor is about to lower, whose
    inputs must be described by AOTAutograd: a weight that is no input of the graph leaves its call as it is.
    """

    name: ClassVar[str] = "bind-calls"

    def run(self, graph: Graph) -> PassReport:
        """Rewrite in place; the report lists each routine, and each call that cannot be in one.

        Nothing is done to a graph whose inputs are not those of its program, one by one and in order: a backward
        graph, or one of whose inputs AOTAutograd made another.
        """
        report = PassReport(self.name)
        if not _has_known_inputs(graph):
            return report
        order, chain = positions(graph), list[Call]()
        for node in list(graph.nodes):
            if node.target not in (_GROUP, _PROLOGUE):
                continue
            if chain and not _refusal(node) and _joins(graph, chain, node, order):
                chain.append(node)
            elif node.target is _GROUP:
                if reason := _refusal(node):
                    report.skip(node.name, reason)
                    continue
                _bind(graph, chain, report)
                order, chain = positions(graph), [node]
        _bind(graph, chain, report)
        graph.lint()
        return report


def _has_known_inputs(graph: Graph) -> bool:
    """Whether the inputs are tensors of the module, and then the arguments in their order."""
    described = [node.meta.get("desc") for node in graph.nodes if node.op == "placeholder"]
    plain = [one.idx for one in described if isinstance(one, PlainAOTInput)]
    known = all(isinstance(one, (PlainAOTInput, ParamAOTInput, BufferAOTInput)) for one in described)
    return known and plain == list(range(len(plain)))


def _refusal(call: Call) -> str:
    """Return why a call cannot be in a routine, or ""."""
    x = call.args[0].meta["val"]
    if x.device != torch.device("cpu"):
        return f"its input is on {x.device}"
    if not isinstance(x.shape[-1], int) or (call.target is _PROLOGUE and _heads(call) is None):
        return "its input has no fixed number of channels"
    strange = next((w for w in _weights(call) if w is not None and _place(w) is None), None)
    return "" if strange is None else f"{strange} is no input that stays as it is"


def _weights(call: Call) -> Iterator[Node | None]:
    """Yield every weight that a call reads, but gain and shift."""
    if call.target is _GROUP:
        for i in _WEIGHTS:
            yield call.args[i]
        for i in _MEMBER:
            yield from call.args[i]


def _gains(call: Call) -> tuple[Node | None, Node | None]:
    """Return gain and shift."""
    gain, shift = call.args[3:] if call.target is _PROLOGUE else call.args[_GAIN : _SHIFT + 1]
    return gain, shift


def _place(weight: Node | None) -> Place:
    """Return where a program finds a weight; None where it cannot, or where the graph itself edits it.

    Inductor, which does not see that a routine reads it, might put the edit first.
    """
    if weight is None or weight.op != "placeholder" or any(map(_is_edit, weight.users)):
        return None
    described = weight.meta.get("desc")
    if isinstance(described, PlainAOTInput):
        return f"@{described.idx}"
    if isinstance(described, (ParamAOTInput, BufferAOTInput)) and not set(described.target) & set(" \n"):
        return f"={described.target}"
    return None


def _is_edit(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _activations(call: Call) -> list[Node]:
    """Return what a call reads and is no weight; what a norm by head reads, before it was split into heads.

    A gain that the graph computes of a weight is among them.
    """
    computed = [value for value in _gains(call) if _place(value) is None]
    read = [_unsplit(call)] if call.target is _PROLOGUE else [call.args[0], call.args[_GATE], *call.args[_RESIDUAL]]
    return [value for value in (*read, *computed) if value is not None]


def _heads(norm: Call) -> int | None:
    """Return into how many heads the channels are split right before a norm, None for another reshaping."""
    x, source = norm.args[0].meta["val"], _unsplit(norm).meta["val"]
    if x is source or x.shape == source.shape:
        return 1
    if len(x.shape) < 2:
        return None
    heads, channels = x.shape[-2:]
    fixed = isinstance(heads, int) and isinstance(channels, int)
    split = fixed and heads * channels == source.shape[-1] and x.shape[:-2] == source.shape[:-1]
    return heads if split and heads > 1 else None  # one head would be taken for no split


def _unsplit(norm: Call) -> Node:
    x: Call = norm.args[0]
    source: Node = x.args[0] if x.target in _VIEWS else x
    return source


def _source(value: Call) -> tuple[Call, int]:
    """Return (call, number of its result) for a value."""
    return (value.args[0], value.args[1]) if value.target is operator.getitem else (value, 0)


def _joins(graph: Graph, chain: Sequence[Call], call: Call, order: dict[Node, int]) -> bool:
    """Whether all that a call reads is there when a chain begins, or comes from the chain itself."""
    members = set(chain)
    outer = [value for value in _activations(call) if _source(value)[0] not in members]
    if call.target is _PROLOGUE and _unsplit(call) in outer:
        return False
    return dependence(outer, members, order) is None and mutation_between(graph, chain[0], call) is None


def _results(call: Call) -> list[list[Node]]:
    """Return the nodes that stand for each result of a call."""
    if call.target is _PROLOGUE:
        return [[call]]
    return [[user for user in call.users if user.args[1] == i] for i in range(len(call.args[_SIGNS]))]


def _bind(graph: Graph, chain: Sequence[Call], report: PassReport) -> None:
    """Put one routine in the place of a chain, or of each half where it has more results than a routine may."""
    inside = _replaced(chain)
    results = [nodes for call in chain for nodes in _results(call)]
    read = [any(user not in inside for node in nodes for user in node.users) for nodes in results]
    if sum(read) not in ROUTINE_RESULTS:
        if len(chain) > 1:
            half = len(chain) // 2
            _bind(graph, chain[:half], report)
            _bind(graph, chain[half:], report)
        elif chain:
            report.skip(chain[0].name, f"it has {sum(read)} results")
        return
    inputs, routine = _routine(chain, [i for i, is_read in enumerate(read) if is_read])
    outputs = [nodes for nodes, is_read in zip(results, read, strict=True) if is_read]
    _replace(graph, chain, inputs, routine, outputs)
    report.changed.append((", ".join(call.name for call in chain), f"one routine of {len(routine.weights)} weights"))


def _replaced(chain: Sequence[Call]) -> set[Node]:
    """Return the calls of a chain with their results, and the splits into heads that only they read."""
    calls = set(chain)
    splits = {call.args[0] for call in chain if call.target is _PROLOGUE and call.args[0] is not _unsplit(call)}
    results = {node for call in chain for nodes in _results(call) for node in nodes}
    return calls | results | {split for split in splits if calls.issuperset(split.users)}


def _routine(chain: Sequence[Call], outputs: Sequence[int]) -> tuple[list[Node], Routine]:
    """Return what the routine of a chain takes, and the routine; outputs: results by number."""
    produced = [(call, i) for call in chain for i in range(len(_results(call)))]
    read = [value for call in chain for value in _activations(call)]
    inputs = list(dict.fromkeys(value for value in read if _source(value) not in produced))
    numbers: dict[Any, int] = {value: i for i, value in enumerate(inputs)}
    numbers |= {result: len(inputs) + i for i, result in enumerate(produced)}

    def number(value: Node | None) -> Place:
        return None if value is None else numbers[value] if value in numbers else numbers[_source(value)]

    steps = tuple(_step(call, number) for call in chain)
    return inputs, Routine(len(inputs), tuple(len(inputs) + i for i in outputs), steps)


def _step(call: Call, number: Callable[[Node | None], Place]) -> Step:
    gain, shift = (_place(value) or number(value) for value in _gains(call))
    columns = call.args[0].meta["val"].shape[-1]
    if call.target is _PROLOGUE:
        _, kind, eps, *_ = call.args
        heads, x = _heads(call), number(_unsplit(call))
        assert heads is not None
        return Step(kind, eps, FLOAT_BITS, columns, heads, x, None, gain, shift, (None,) * len(_WEIGHTS), ())
    a = call.args
    lists = zip(*(a[i] for i in _MEMBER), a[_RESIDUAL], strict=True)
    members = tuple(
        Member(n_rows(weights[0].meta["val"]), tuple(map(_place, weights)), number(residual))
        for *weights, residual in lists
    )
    weights = tuple(_place(a[i]) for i in _WEIGHTS)
    x, gate = number(a[0]), number(a[_GATE])
    return Step(a[_KIND], a[_EPS], a[_BITS], columns, 1, x, gate, gain, shift, weights, members)


def _replace(
    graph: Graph, chain: Sequence[Call], inputs: list[Node], routine: Routine, outputs: Sequence[list[Node]]
) -> None:
    """Put a routine in, hand its results to the readers, and move those that stand before it behind it."""
    gone = _replaced(chain)
    with graph.inserting_after(chain[-1]):
        call = graph.call_function(getattr(OPS, f"routine{len(outputs)}").default, (inputs, routine.text()))
    made = [call]
    if len(outputs) > 1:
        for i in range(len(outputs)):
            with graph.inserting_after(made[-1]):
                made.append(graph.call_function(operator.getitem, (call, i)))
        call.meta["val"] = tuple(nodes[0].meta["val"] for nodes in outputs)
        del made[0]
    for nodes, result in zip(outputs, made, strict=True):
        result.meta = {"val": nodes[0].meta["val"]}
        for node in nodes:
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in gone)
    for node in reversed([node for node in graph.nodes if node in gone]):
        graph.erase_node(node)
    sink_readers(graph, made)

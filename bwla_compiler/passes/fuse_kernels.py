"""FuseKernels: packed linears that read one tensor become one call, with what precedes and follows them inside."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.graph_order import dependence, mutation_between, positions, sink_readers
from bwla_compiler.passes.match_activations import match_activation
from bwla_compiler.passes.match_graph import dtype_of
from bwla_compiler.passes.match_norms import match_norm
from bwla_compiler.passes.match_prologue import Found, Matcher, dtype_refusal, match_call
from bwla_compiler.passes.packed_calls import (
    NO_TRANSFORM,
    OPS,
    Packed,
    find_packed,
    foreign_reader,
    residual_of,
    results_as,
)

MATCHERS: tuple[Matcher, ...] = (match_norm, match_activation, match_call)


@dataclass(frozen=True)
class Draft:
    """One call to be made: its input, what precedes, and for each member the nodes it replaces and its residual."""

    members: tuple[Packed, ...]
    x: Node
    found: Found | None
    results: tuple[list[Node], ...]
    residuals: tuple[Node | None, ...]

    @property
    def operands(self) -> list[Node]:
        """Every node that the call reads."""
        values: list[Any] = [self.x, *self.residuals, *self.members[0].transform]
        if self.found is not None:
            values += [self.found.gain, self.found.shift, self.found.gate]
        for member in self.members:
            values += member.operands[1:]
        return [value for value in values if isinstance(value, Node)]

    @property
    def is_plain(self) -> bool:
        """Whether nothing but linears is in it, and what it reads are tensors: of others a routine is made."""
        first = self.members[0]
        alone = self.found is None and not any(self.residuals) and first.transform == NO_TRANSFORM
        return alone and not first.is_anchored

    def __str__(self) -> str:
        parts = [self.found.kind] if self.found is not None else []
        parts += ["transform"] if self.members[0].transform != NO_TRANSFORM else []
        parts.append(f"{len(self.members)} linear{'s' if len(self.members) > 1 else ''}")
        n_residuals = sum(r is not None for r in self.residuals)
        parts += [f"{n_residuals} residual{'s' if n_residuals > 1 else ''}"] if n_residuals else []
        return "one call of " + ", ".join(parts)


@dataclass(frozen=True)
class FuseKernels:
    """Make one `bwla.fused_group` of linears with the same input (q/k/v, gate/up), norm or activation, and residual.

    Works in place on a functional aten graph after decompositions, static or symbolic; nodes need meta "val".
    Between the input and the results all is float32, so that roundings to bfloat16 in between are left out.
    Linears alone become a `bwla.linear_group`; what does not match exactly stays as it is, with the reason.
    """

    name: ClassVar[str] = "fuse-kernels"

    def run(self, graph: Graph) -> PassReport:
        """Merge what can be merged; the report lists each call made, and each refusal with its reason."""
        report = PassReport(self.name)
        groups: dict[tuple[Any, ...], list[Packed]] = {}
        for packed in find_packed(graph):
            groups.setdefault(packed.shared, []).append(packed)
        for members in groups.values():
            _fuse(graph, members, report)
        if report.changed:
            graph.eliminate_dead_code()
            graph.lint()
        return report


def _fuse(graph: Graph, members: Sequence[Packed], report: PassReport) -> None:
    """Make one call of linears that share their input, or several where one needs another."""
    names = ", ".join(m.node.name for m in members)
    order = positions(graph)
    draft = _drafted(members, order, report)
    if draft.is_plain and len(members) == 1:
        report.skip(names, "no norm, activation, transform, residual or other linear to fuse it with")
        return
    if reason := _refusal(graph, draft, order):
        report.skip(names, reason)
        if len(members) > 1:
            for member in members:
                _fuse(graph, [member], report)
        return
    _replace(graph, draft, order)
    report.changed.append((names, str(draft)))


def _drafted(members: Sequence[Packed], order: dict[Node, int], report: PassReport) -> Draft:
    """Return the widest call that is right, reporting what could not be pulled in."""
    names = ", ".join(m.node.name for m in members)
    source = members[0].source
    found = next((f for f in (matcher(source) for matcher in MATCHERS) if f is not None), None)
    if found is not None:
        reason = dtype_refusal(found)
        if not reason and (reader := foreign_reader(source)) is not None:
            reason = f"its {found.kind} is also read by {reader.name}"
        results = [results_as(m.node, dtype_of(found.x)) for m in members]
        if not reason and not all(results):
            reason = f"its {found.kind} reads {dtype_of(found.x)}, and its result is read in another dtype"
        if not reason:
            return _with_residuals(members, found.x, found, results, order)
        report.skip(names, reason)
    for x in (source, members[0].read):
        results = [results_as(m.node, dtype_of(x)) for m in members]
        if all(results):
            return _with_residuals(members, x, None, results, order)
    raise AssertionError("a linear's result has the dtype of what it reads")


def _with_residuals(
    members: Sequence[Packed], x: Node, found: Found | None, results: list[list[Node]], order: dict[Node, int]
) -> Draft:
    """Return the call, with additions to its results pulled in where they need no other result of it."""
    nodes = {m.node for m in members}
    replaced: list[list[Node]] = []
    residuals: list[Node | None] = []
    for result in results:
        pulled = residual_of(result[0]) if len(result) == 1 else None
        if pulled is not None and dependence([pulled[1]], nodes, order) is None:
            replaced.append([pulled[0]])
            residuals.append(pulled[1])
        else:
            replaced.append(result)
            residuals.append(None)
    return Draft(tuple(members), x, found, tuple(replaced), tuple(residuals))


def _refusal(graph: Graph, draft: Draft, order: dict[Node, int]) -> str:
    """Return why linears cannot be one call, or ""."""
    nodes = {m.node for m in draft.members}
    if (needs := dependence(draft.operands, nodes, order)) is not None:
        return f"{needs[0].name} depends on {needs[1].name}"
    first = min(nodes, key=order.__getitem__)
    if (edit := mutation_between(graph, first, _place(draft, order))) is not None:
        return f"{edit.name} edits a tensor in place between them"
    return ""


def _place(draft: Draft, order: dict[Node, int]) -> Node:
    """Return the last node that the call must come after."""
    return max([m.node for m in draft.members] + draft.operands, key=order.__getitem__)


def _replace(graph: Graph, draft: Draft, order: dict[Node, int]) -> None:
    """Put the call in, hand its results to the readers, and move those that stand before it behind it."""
    with graph.inserting_after(_place(draft, order)):
        call = graph.call_function(*_call(draft))
    made: list[Node] = []
    after = call
    for i in range(len(draft.members)):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, i))
        made.append(after)
    call.meta["val"] = [nodes[0].meta.get("val") for nodes in draft.results]
    for nodes, result in zip(draft.results, made, strict=True):
        result.meta = dict(nodes[0].meta)
        for node in nodes:
            node.replace_all_uses_with(result)
    sink_readers(graph, made)
    for nodes, member in zip(draft.results, draft.members, strict=True):
        for node in dict.fromkeys([*nodes, *_between(member.node, nodes), member.node]):
            graph.erase_node(node)


def _between(linear: Node, ends: list[Node]) -> list[Node]:
    """Return the conversion between a linear and the sum that took it in, if there is one."""
    return [user for user in linear.users if user not in ends]


def _call(draft: Draft) -> tuple[Any, tuple[Any, ...]]:
    """Return (operator, operands) of the call."""
    first = draft.members[0]
    columns = [list(column) for column in zip(*(m.operands for m in draft.members), strict=True)]
    signs, scale, low_rank, bias = columns[1], columns[2], columns[4:7], columns[7]
    column_scale, bits, column_exponent = first.operands[3], first.operands[8], first.operands[10]
    exponents, rank_exponents = columns[9], columns[11]
    if draft.is_plain:
        operands = (draft.x, signs, scale, column_scale, *low_rank, bias, bits, exponents, column_exponent)
        return OPS.linear_group.default, (*operands, rank_exponents)
    found = draft.found or Found("none", draft.x, set[torch.dtype]())
    prologue = (draft.x, found.gate, found.kind, found.eps, found.gain, found.shift, *first.transform)
    linears = (signs, scale, column_scale, *low_rank, bias, list(draft.residuals), bits, exponents, column_exponent)
    return OPS.fused_group.default, (*prologue, *linears, rank_exponents)

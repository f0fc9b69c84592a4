"""Whether what one plan folds is legal in another graph of the same model, and the plan that folds nothing.

torch.compile hands over one graph per way of calling a model: prefill, decode, with or without a cache. One set of
folded weights serves them all where each graph's own plan grants what was folded.
"""

import dataclasses
from collections.abc import Collection, Set

from bwla_compiler.graph.plan import Expression, Plan

_ROOM = {"pinned": 0, "fixes-ones": 1, "free": 2}


def disagreement(plan: Plan, seen: Plan, *, bases: Set[str], present: Collection[str]) -> str:
    """Return why folding `plan` would change the function of the graph that `seen` was made from; "" where it is legal.

    bases: of the plan, those that are rotated. present: parameters that the graph reads, all their names.
    """
    return (
        _tied(plan, seen, present)
        or _linears(plan, seen, present)
        or _norms(plan, seen, present)
        or _rotations(plan, seen, bases, present)
    )


def without_folds(plan: Plan, *, reason: str) -> Plan:
    """Return the plan in which each linear turns its own input online, and nothing else is touched.

    It is legal in every graph: a linear and the transform before it compute what the linear alone did.
    """
    linears = tuple(
        dataclasses.replace(
            x,
            decision="online",
            reason=reason,
            input=Expression("leaf", x.in_features),
            output=Expression("leaf", x.out_features),
        )
        if x.decision != "alone"
        else x
        for x in plan.linears
    )
    return dataclasses.replace(plan, bases=(), linears=linears, norms=(), axes=())


def _tied(plan: Plan, seen: Plan, present: Collection[str]) -> str:
    for embedding, head in plan.tied:
        if embedding in present and (embedding, head) not in seen.tied:
            return f"{embedding} and {head} share a tensor that this graph does not use as embedding and head alone"
    return ""


def _linears(plan: Plan, seen: Plan, present: Collection[str]) -> str:
    theirs = {x.name: x.decision for x in seen.linears}
    for linear in plan.linears:
        if linear.parameter in present and linear.decision != "alone" and theirs.get(linear.name, "alone") == "alone":
            return f"{linear.name} is no plain linear in this graph"
    return ""


def _norms(plan: Plan, seen: Plan, present: Collection[str]) -> str:
    theirs = {(n.gain, n.shift, n.gain_offset, frozenset(n.absorbed_by)) for n in seen.norms}
    for norm in plan.norms:
        if not norm.absorbed_by or not {norm.gain, norm.shift}.intersection(present):
            continue
        if (norm.gain, norm.shift, norm.gain_offset, frozenset(norm.absorbed_by)) not in theirs:
            return f"the gain {norm.gain or norm.shift} is read by more than its linears in this graph"
    return ""


def _rotations(plan: Plan, seen: Plan, bases: Set[str], present: Collection[str]) -> str:
    """Match the rotated bases with the graph's own, one to one, on every parameter axis that the graph reads."""
    mine = {(a.parameter, a.axis): a.expression for a in plan.axes if a.parameter in present}
    theirs = {(a.parameter, a.axis): a.expression for a in seen.axes}
    to_theirs: dict[str, str] = {}
    to_mine: dict[str, str] = {}
    for key, expression in mine.items():
        if not bases.isdisjoint(_names(expression)) and not _alike(expression, theirs.get(key)):
            return f"axis {key[1]} of {key[0]} is not free in this graph, or cut in other parts"
        for own, other in zip(_names(expression), _names(theirs.get(key, expression)), strict=False):
            if own in bases and (
                not other or to_theirs.setdefault(own, other) != other or to_mine.setdefault(other, own) != own
            ):
                return f"the basis {own} is pinned or split in this graph, at axis {key[1]} of {key[0]}"
    for key, expression in theirs.items():
        own_names = _names(mine[key]) if _alike(expression, mine.get(key)) else [""] * len(_names(expression))
        for own, other in zip(own_names, _names(expression), strict=True):
            if other in to_mine and own != to_mine[other]:
                return f"axis {key[1]} of {key[0]} shares the basis {to_mine[other]} in this graph"
    return _less_room(plan, seen, to_theirs)


def _names(expression: Expression) -> list[str]:
    """Return the bases of an axis leaf by leaf, "" for pinned ones."""
    return [leaf.basis for leaf in expression.leaves()]


def _alike(a: Expression, b: Expression | None) -> bool:
    """Return whether two axes are built alike, names aside."""
    if b is None or (a.kind, a.size, len(a.parts)) != (b.kind, b.size, len(b.parts)):
        return False
    return all(map(_alike, a.parts, b.parts))


def _less_room(plan: Plan, seen: Plan, matched: dict[str, str]) -> str:
    mine = {b.name: b for b in plan.bases}
    theirs = {b.name: b for b in seen.bases}
    for own, other in matched.items():
        if _ROOM[theirs[other].freedom] < _ROOM[mine[own].freedom]:
            return f"the basis {own} is {theirs[other].freedom} in this graph: {theirs[other].reason}"
    return ""

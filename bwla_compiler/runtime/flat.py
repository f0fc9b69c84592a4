"""The operands of a fused group as one list: Python hands a list of tensors to an operator ten times faster than lists
of optional ones.

plan: [kind, bits, members, place of each single operand, places of each member's operands], a place being an index
into the list of tensors, or -1 for none. Works on tensors and on nodes of a graph alike.
"""

from collections.abc import Sequence
from typing import Any

from bwla_compiler.spec import PROLOGUES

SINGLES = (0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 14, 22)
"""Where bwla::fused_group takes single tensors: x, gate, gain, shift, transform (6), column scale, its exponent."""

LISTS = (12, 13, 15, 16, 17, 18, 19, 21, 23)
"""Where it takes one per member: signs, scale, low rank (3), bias, residual, exponents of scale and low rank."""

KIND, EPS, BITS, N_OPERANDS = 2, 3, 20, 24


def flatten(operands: Sequence[Any]) -> tuple[list[Any], list[int], float]:
    """Return (tensors, plan, eps) for the operands of bwla::fused_group by position."""
    assert len(operands) == N_OPERANDS
    members = list(zip(*(operands[i] for i in LISTS), strict=True))
    tensors: list[Any] = []
    plan = [PROLOGUES.index(operands[KIND]), operands[BITS], len(members)]
    for operand in (*(operands[i] for i in SINGLES), *(one for member in members for one in member)):
        plan.append(-1 if operand is None else len(tensors))
        if operand is not None:
            tensors.append(operand)
    return tensors, plan, operands[EPS]


def unflatten(tensors: Sequence[Any], plan: Sequence[int], eps: float) -> tuple[Any, ...]:
    """Return the operands of bwla::fused_group that `flatten` was given."""
    kind, bits, n_members = plan[:3]
    values = [None if place < 0 else tensors[place] for place in plan[3:]]
    operands: list[Any] = [None] * N_OPERANDS
    operands[KIND], operands[EPS], operands[BITS] = PROLOGUES[kind], eps, bits
    for i, value in zip(SINGLES, values, strict=False):
        operands[i] = value
    for offset, i in enumerate(LISTS):
        operands[i] = values[len(SINGLES) + offset :: len(LISTS)]
    assert len(operands[LISTS[0]]) == n_members
    return tuple(operands)

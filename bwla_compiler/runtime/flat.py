"""The operands of a fused group as one list: Python hands a list of tensors to an operator ten times faster than lists
of optional ones.

plan: kind, bits, members, place of each single operand, places of each member's operands, a place being an index into
the list of tensors, or -1 for none. One text of words, since Python hands over a text for the price of one integer.
Works on tensors and on nodes of a graph alike.
"""

from collections.abc import Sequence
from typing import Any

SINGLES = (0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 14, 22)
"""Where bwla::fused_group takes single tensors: x, gate, gain, shift, transform (6), column scale, its exponent."""

LISTS = (12, 13, 15, 16, 17, 18, 19, 21, 23)
"""Where it takes one per member: signs, scale, low rank (3), bias, residual, exponents of scale and low rank."""

MEMBERS = LISTS[0]

KIND, EPS, BITS, N_OPERANDS = 2, 3, 20, 24


def flatten(operands: Sequence[Any]) -> tuple[list[Any], str, float]:
    """Return (tensors, plan, eps) for the operands of bwla::fused_group by position."""
    assert len(operands) == N_OPERANDS
    members = list(zip(*(operands[i] for i in LISTS), strict=True))
    tensors: list[Any] = []
    plan = [operands[KIND], operands[BITS], len(members)]
    for operand in (*(operands[i] for i in SINGLES), *(one for member in members for one in member)):
        plan.append(-1 if operand is None else len(tensors))
        if operand is not None:
            tensors.append(operand)
    return tensors, " ".join(map(str, plan)), operands[EPS]


def unflatten(tensors: Sequence[Any], plan: str, eps: float) -> tuple[Any, ...]:
    """Return the operands of bwla::fused_group that `flatten` was given."""
    kind, bits, n_members, *places = plan.split()
    values = [None if int(place) < 0 else tensors[int(place)] for place in places]
    operands: list[Any] = [None] * N_OPERANDS
    operands[KIND], operands[EPS], operands[BITS] = kind, eps, int(bits)
    for i, value in zip(SINGLES, values, strict=False):
        operands[i] = value
    for offset, i in enumerate(LISTS):
        operands[i] = values[len(SINGLES) + offset :: len(LISTS)]
    assert len(operands[LISTS[0]]) == int(n_members)
    return tuple(operands)

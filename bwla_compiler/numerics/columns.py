"""A sequential pass over columns, each coupled to those before it, done mostly as matrix products."""

from collections.abc import Callable

import torch
from torch import Tensor

LEAF = 16
"""Columns visited one by one between two matrix products: small enough to stay in cache and off the thread pool."""


def visit_columns(columns: Tensor, coupling: Tensor, decide: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return delta [b, m] with delta_j = decide(j, columns_j + sum_{k < j} coupling_kj delta_k), j in order.

    columns [b, m], one column of a weight a row, overwritten; coupling [b, b], of which the upper triangle is read.
    By halves: the left half in order, one product into the right half, the right half.
    """
    delta = torch.zeros_like(columns)
    _visit(columns, coupling, delta, decide, 0, columns.shape[0])
    return delta


def _visit(
    columns: Tensor, coupling: Tensor, delta: Tensor, decide: Callable[[int, Tensor], Tensor], low: int, high: int
) -> None:
    if high - low > LEAF:
        middle = (low + high) // 2
        _visit(columns, coupling, delta, decide, low, middle)
        columns[middle:high].addmm_(coupling[low:middle, middle:high].mT, delta[low:middle])
        _visit(columns, coupling, delta, decide, middle, high)
        return
    for j in range(low, high):
        column = torch.addmv(columns[j], delta[low:j].mT, coupling[low:j, j]) if j > low else columns[j]
        delta[j] = decide(j, column)

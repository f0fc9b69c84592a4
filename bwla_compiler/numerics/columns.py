"""A sequential pass over columns, each coupled to those before it, done mostly as matrix products."""

from collections.abc import Callable

import torch
from torch import Tensor

LEAF = 16
"""Columns visited one by one between two matrix products: small enough to stay in cache and off the thread pool."""

Decide = Callable[[int, Tensor, Tensor], object]
"""decide(j, column, value): write the value [m] of column j, which is `column` [m] once all before it are known."""


def visit_columns(columns: Tensor, coupling: Tensor, decide: Decide) -> Tensor:
    """Return values [b, m] with value_j = decide(j, columns_j + sum_{k < j} coupling_kj value_k), j in order.

    columns [b, m], one column of a weight a row, overwritten by what was decided on; coupling [b, b], of which the
    strict upper triangle is read. By halves: the left half in order, one product into the right half, the right half.
    """
    values = torch.zeros_like(columns)
    _visit(columns, coupling.triu(1), values, decide, 0)
    return values


def _visit(columns: Tensor, coupling: Tensor, values: Tensor, decide: Decide, first: int) -> None:
    size = columns.shape[0]
    if size > LEAF:
        half = size // 2
        _visit(columns[:half], coupling[:half, :half], values[:half], decide, first)
        columns[half:].addmm_(coupling[:half, half:].mT, values[:half])
        _visit(columns[half:], coupling[half:, half:], values[half:], decide, first + half)
        return
    known = values.mT  # zero where a column is still to come: the same view then serves them all
    for j, parts in enumerate(zip(columns.unbind(0), coupling.unbind(1), values.unbind(0), strict=True), first):
        column, weights, value = parts
        decide(j, column.addmv_(known, weights), value)

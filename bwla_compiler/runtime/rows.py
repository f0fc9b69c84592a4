"""Tokens as rows: the leading dimensions of an operator's input taken off, and given to its result."""

from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """Return x [..., n] as [tokens, n], also where a dimension is 0."""
    if x.dim() == 2:
        return x
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def shaped_like(y: Tensor, x: Tensor) -> Tensor:
    """Return y [tokens, out] with the dtype and leading dimensions of x."""
    if y.dtype != x.dtype:
        y = y.to(x.dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def empty_result(x: Tensor, features: int) -> Tensor:
    """Return an empty tensor [..., features] for the result of x [..., n]."""
    return x.new_empty([*x.shape[:-1], features])

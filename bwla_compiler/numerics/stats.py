"""LinearStats: what a quantizer must know of the input of a group of linears, summed over tokens."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bwla_compiler.errors import CalibrationError, ShapeError

CHUNK_TOKENS = 4096
"""Tokens per float32 product, each then added to float64: keeps long sums exact to float32's rounding of short ones."""


@dataclass
class LinearStats:
    """Sums over tokens of one group's input; mergeable over batches and ranks.

    n_tokens: count. gram_sum [n, n] float64: sum of x^T x. cross_sum [m, n] float64 or None: sum of drift^T x.
    x_absmax [n] float32: largest |x| of each channel.
    """

    n_tokens: int
    gram_sum: Tensor
    cross_sum: Tensor | None
    x_absmax: Tensor

    @classmethod
    def empty(cls, in_features: int, out_features: int | None = None, *, device: torch.device | str = "cpu") -> Self:
        """Return sums of no tokens; out_features: rows of the drift, None where none is gathered."""
        gram = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        absmax = torch.zeros(in_features, device=device)
        if out_features is None:
            return cls(0, gram, None, absmax)
        return cls(0, gram, torch.zeros(out_features, in_features, dtype=torch.float64, device=device), absmax)

    def update(self, x_q: Tensor, drift: Tensor | None = None) -> None:
        """Add tokens x_q [N, n] and, where a cross moment is gathered, their drift [N, m].

        Raises ShapeError for wrong shapes or a drift that comes and goes, CalibrationError for NaN or infinity.
        """
        self._check(x_q, drift)
        for low in range(0, x_q.shape[0], CHUNK_TOKENS):
            x = x_q[low : low + CHUNK_TOKENS].float()
            gram = _finite(x.mT @ x, "activations")
            if self.cross_sum is not None and drift is not None:
                self.cross_sum += _finite(drift[low : low + CHUNK_TOKENS].float().mT @ x, "drift")
            self.gram_sum += gram
            torch.maximum(self.x_absmax, x.abs().amax(0), out=self.x_absmax)
        self.n_tokens += x_q.shape[0]

    def merge(self, other: "LinearStats") -> Self:
        """Add another's sums to this one's, in place, and return it. Raises ShapeError where they do not fit."""
        if (self.cross_sum is None) != (other.cross_sum is None) or self.gram_sum.shape != other.gram_sum.shape:
            raise ShapeError("statistics of different linears cannot be merged: sizes or cross moments differ")
        self.n_tokens += other.n_tokens
        self.gram_sum += other.gram_sum.to(self.gram_sum.device)
        torch.maximum(self.x_absmax, other.x_absmax.to(self.x_absmax.device), out=self.x_absmax)
        if self.cross_sum is not None and other.cross_sum is not None:
            self.cross_sum += other.cross_sum.to(self.cross_sum.device)
        return self

    def gram(self) -> Tensor:
        """Return the mean x^T x [n, n] float64. Raises CalibrationError where no token was seen."""
        return self.gram_sum / self._count()

    def cross(self) -> Tensor:
        """Return the mean drift^T x [m, n] float64. Raises CalibrationError where none was gathered."""
        if self.cross_sum is None:
            raise CalibrationError("no drift was gathered for this linear; make its statistics with out_features")
        return self.cross_sum / self._count()

    def _count(self) -> int:
        if self.n_tokens == 0:
            raise CalibrationError("no calibration token reached this linear")
        return self.n_tokens

    def _check(self, x_q: Tensor, drift: Tensor | None) -> None:
        n = self.gram_sum.shape[0]
        if x_q.dim() != 2 or x_q.shape[1] != n:
            raise ShapeError(f"tokens of shape {list(x_q.shape)}: expected [tokens, {n}]")
        if (drift is None) != (self.cross_sum is None):
            raise ShapeError("drift must be given at every update, or never (statistics made without out_features)")
        if drift is not None and self.cross_sum is not None:
            expected = (x_q.shape[0], self.cross_sum.shape[0])
            if drift.shape != expected:
                raise ShapeError(f"drift of shape {list(drift.shape)}: expected {list(expected)}")


def _finite(product: Tensor, name: str) -> Tensor:
    """Return a product over tokens, in which a NaN or infinity of its factors would stand, and which is smaller."""
    if not product.isfinite().all():
        raise CalibrationError(f"{name} hold NaN or infinity; check the model in float32 on these tokens")
    return product


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return gram + damping * mean(diag) * I, [n, n], a new tensor.

    A dead column (zero diagonal: its channel was never active) first gets the mean diagonal, so that it is rounded
    like the rest; a gram of all zeros gives (1 + damping) * I.
    """
    H = gram.clone()
    diagonal = H.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal.masked_fill_(diagonal <= 0, mean).add_(damping * mean)
    return H

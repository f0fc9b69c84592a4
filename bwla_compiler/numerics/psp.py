"""PSP: W ~ scale * signs + U V, signs and an int8 low-rank pair fitted in turn on a Hessian.

With H = C C^T, the best U V of rank r for E = W - scale * signs is SVD_r(E C) C^-1 (whitened SVD; SVD-LLM,
2403.07378). Ours differs from the paper's PSP in the start (whitened SVD of W, not zero), in the whitening, and in
rounding the pair to int8 before it is judged, so that what is scored is what is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.hessian import check_hessian, cholesky
from bwla_compiler.numerics.signs import descend_signs

EXACT_SVD = 128
"""Up to this smaller side the SVD is exact; above it a randomised one costs a few products."""
OVERSAMPLING, POWER_ITERATIONS = 16, 4


@dataclass(frozen=True)
class Split:
    """signs [m, n] int8, scale [m, 1], low_rank_out [m, r], low_rank_in [r, n].

    The pair is already rounded: `int8_factors` of it gives its codes back. losses: tr(E H E^T) at the
    start and after each iteration, signs and scales always refitted beside the rounded pair; the result is the best.
    """

    signs: Tensor
    scale: Tensor
    low_rank_out: Tensor
    low_rank_in: Tensor
    losses: tuple[float, ...]


def hessian_error(E: Tensor, H: Tensor) -> float:
    """Return tr(E H E^T), the mean squared output error of a weight error E [m, n] under H [n, n]; sums in float64."""
    check_hessian(E, H)
    return float(((E @ H.to(E.dtype)) * E).sum(dtype=torch.float64))


def int8_factors(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes_out [m, r] int8, codes_in [r, n] int8, scale [r] float32), U V ~ (codes_out * scale) @ codes_in.

    U [m, r], V [r, n]. Symmetric, one scale a rank and side, largest code 127; the two scales are multiplied into
    one. Each entry of U and V is off by at most half its scale. Raises ShapeError where the ranks differ.
    """
    if U.dim() != 2 or V.dim() != 2 or U.shape[1] != V.shape[0]:
        raise ShapeError(f"low-rank pair {list(U.shape)} and {list(V.shape)}: expected [out, rank] and [rank, in]")
    if U.shape[1] == 0:
        return U.to(torch.int8), V.to(torch.int8), U.new_zeros(0, dtype=torch.float32)
    scale_out = _unit(U.double().abs().amax(0) / 127)
    scale_in = _unit(V.double().abs().amax(1) / 127)
    codes_out = (U.double() / scale_out).round().to(torch.int8)
    codes_in = (V.double() / scale_in[:, None]).round().to(torch.int8)
    return codes_out, codes_in, (scale_out * scale_in).float()


def split_low_rank(
    W: Tensor,
    H: Tensor,
    *,
    rank: int,
    sweeps: int = 4,
    warm_sweeps: int = 2,
    iterations: int = 4,
) -> Split:
    """Return signs, scales and an int8-rounded pair of the given rank with a low tr(E H E^T).

    W [m, n]; H [n, n] positive definite. rank 0 is sign descent alone, with empty factors [m, 0] and [0, n]; a
    rank above min(m, n) is cut to it. Raises ShapeError, CalibrationError.
    """
    return split_group([W], H, rank=rank, sweeps=sweeps, warm_sweeps=warm_sweeps, iterations=iterations)[0]


def split_group(
    weights: Sequence[Tensor],
    H: Tensor,
    *,
    rank: int,
    sweeps: int = 4,
    warm_sweeps: int = 2,
    iterations: int = 4,
) -> list[Split]:
    """Return one split for each of several weights [m_i, n] that read the same input; see `split_low_rank`.

    Each has a pair of its own. Their rows, which do not touch one another, descend together: the sequential pass
    over the columns is paid once for the group.
    """
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    members = [W.to(dtype) for W in weights]
    for W in members:
        check_hessian(W, H)
    H = H.to(dtype)
    factor = cholesky(H) if rank > 0 else H
    fits = _descend(members, [_start(W, factor, rank=rank) for W in members], H, None, sweeps=sweeps)
    found = [_Best(fit) for fit in fits]
    for _ in range(iterations if rank > 0 else 0):
        pairs = [
            _rounded_pair(W - fit.scale * fit.signs, factor, rank=fit.low_rank_out.shape[1])
            for W, fit in zip(members, fits, strict=True)
        ]
        fits = _descend(members, pairs, H, [fit.signs for fit in fits], sweeps=warm_sweeps)
        for best, fit in zip(found, fits, strict=True):
            best.offer(fit)
    return [best.split() for best in found]


class _Best:
    """The split with the lowest loss so far, and all losses."""

    def __init__(self, first: Split) -> None:
        self.best, self.losses = first, [*first.losses]

    def offer(self, fit: Split) -> None:
        self.losses.extend(fit.losses)
        if fit.losses[-1] <= min(self.losses):
            self.best = fit

    def split(self) -> Split:
        return replace(self.best, losses=tuple(self.losses))


def _start(W: Tensor, factor: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    rank = min(rank, *W.shape)
    if rank <= 0:
        return W.new_zeros(W.shape[0], 0), W.new_zeros(0, W.shape[1])
    return _rounded_pair(W, factor, rank=rank)


def _descend(
    members: Sequence[Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    H: Tensor,
    signs: Sequence[Tensor] | None,
    *,
    sweeps: int,
) -> list[Split]:
    """Fit signs and scales of all members beside their pairs, in one descent over the stacked rows."""
    rests = [W - U @ V for W, (U, V) in zip(members, pairs, strict=True)]
    start = None if signs is None else torch.cat(list(signs))
    found, scale = descend_signs(torch.cat(rests), H, signs=start, sweeps=sweeps)
    rows = [W.shape[0] for W in members]
    parts = zip(found.split(rows), scale.split(rows), pairs, rests, strict=True)
    return [Split(b, a, U, V, (hessian_error(rest - a * b, H),)) for b, a, (U, V), rest in parts]


def _unit(scale: Tensor) -> Tensor:
    """Return scale with 1 in place of zeros, so that a zero vector has zero codes."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _rounded_pair(E: Tensor, C: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Return the int8-rounded U [m, r], V [r, n] nearest to E in the norm ||(E - U V) C||, the scale shared evenly."""
    U, s, Vh = _truncated_svd(E @ C, rank=rank)
    V = torch.linalg.solve_triangular(C, Vh, upper=False, left=False)
    codes_out, codes_in, scale = int8_factors(U * s, V)
    root = scale.to(E.dtype).sqrt()
    return codes_out * root, codes_in * root[:, None]


def _truncated_svd(A: Tensor, *, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [m, r], s [r], Vh [r, n] of the r largest singular values (Halko et al., 0909.4061, algorithm 4.4).

    Seeded: the sketch only has to be generic, and the same weight must give the same result.
    """
    width = rank + OVERSAMPLING
    if min(A.shape) <= max(EXACT_SVD, width):
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        return U[:, :rank], s[:rank], Vh[:rank]
    generator = torch.Generator().manual_seed(0)
    basis = A @ torch.randn(A.shape[1], width, generator=generator).to(A)
    for _ in range(POWER_ITERATIONS):
        basis = A @ torch.linalg.qr(A.mT @ torch.linalg.qr(basis).Q).Q
    Q = torch.linalg.qr(basis).Q
    U, s, Vh = torch.linalg.svd(Q.mT @ A, full_matrices=False)
    return Q @ U[:, :rank], s[:rank], Vh[:rank]

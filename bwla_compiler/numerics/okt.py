"""OKT: an orthogonal Kronecker Q = left (x) right under which the rows of W Q are close to +-alpha.

Expectation maximisation over a symmetric mixture of two Gaussians a row. E-step: T = alpha sign(w') (hard; ITQ,
Gong and Lazebnik 2011) or the posterior mean alpha tanh(alpha w' / sigma^2), each row over its sigma^2 (soft; the BWLA
paper: then the mixture's likelihood never falls). M-step: Q1 = polar(sum_i W_i Q2 T_i^T), Q2 = polar(sum_i W_i^T Q1
T_i), with W_i row i as an [n1, n2] matrix. Ours differs from the paper in the randomised Hadamard start and in the hard
E-step by default.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.kronecker import apply_kronecker, hadamard

VARIANCE_FLOOR = 1e-3
"""Least sigma^2 of a row in the soft E-step, over its mean square: below it tanh is a sign and EM stalls."""
LOUDEST = 1e12
"""The most that a row counts in the soft M-step, over what a row of the mean square and of no fit counts."""


@dataclass(frozen=True)
class OktFit:
    """A fitted rotation: left [n1, n1], right [n2, n2], None where the identity was kept.

    losses: ||W' - alpha sign(W')||^2 / ||W||^2 at the start and after each iteration. likelihoods: of soft EM, the mean
    log likelihood of a weight before each iteration's rotation, in nats.
    """

    left: Tensor | None
    right: Tensor | None
    losses: tuple[float, ...]
    likelihoods: tuple[float, ...] = ()


def fit_okt(
    W: Tensor,
    *,
    n1: int,
    n2: int,
    generator: torch.Generator,
    iterations: int = 30,
    soft: bool = False,
    start: Literal["hadamard", "identity"] = "hadamard",
    fit_left: bool = True,
    fit_right: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> OktFit:
    """Return the Kronecker rotation that makes the rows of W most binary.

    W [m, n1 * n2], float32 or float64 -> factors in its dtype, on its device. The losses of hard EM never rise and
    the likelihoods of soft EM never fall (up to rounding). Raises ShapeError where W is not [m, n1 * n2].
    """
    if W.dim() != 2 or W.shape[1] != n1 * n2:
        raise ShapeError(f"weight has shape {list(W.shape)}: expected [out, {n1} * {n2}]")
    left = _start(n1, W, start=start, generator=generator) if fit_left else None
    right = _start(n2, W, start=start, generator=generator) if fit_right else None
    energy = W.square().sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny)
    cube = W.reshape(-1, n1, n2)
    rotated = apply_kronecker(W, left, right)
    losses = [_binary_loss(rotated, energy)]
    mixture: _Mixture | None = None
    likelihoods: list[float] = []
    for done in range(iterations if fit_left or fit_right else 0):
        if soft:
            mixture = _fit_mixture(rotated, mixture)
            likelihoods.append(mixture.likelihood(rotated))
        target = (_hard_target(rotated) if mixture is None else mixture.target(rotated)).reshape_as(cube)
        if fit_left:
            half = cube if right is None else cube @ right
            left = _polar(torch.tensordot(half, target, dims=([0, 2], [0, 2])))
        if fit_right:
            half = cube if left is None else left.mT @ cube
            right = _polar(torch.tensordot(half, target, dims=([0, 1], [0, 1])))
        rotated = apply_kronecker(W, left, right)
        losses.append(_binary_loss(rotated, energy))
        if progress:
            progress("okt", done + 1, iterations)
    return OktFit(left, right, tuple(losses), tuple(likelihoods))


def _start(n: int, W: Tensor, *, start: str, generator: torch.Generator) -> Tensor:
    if start == "identity":
        return torch.eye(n, dtype=W.dtype, device=W.device)
    return hadamard(n, generator=generator).to(W)


def _binary_loss(rotated: Tensor, energy: Tensor) -> float:
    """Return ||W' - alpha sign(W')||^2 / ||W||^2 = 1 - n sum_i alpha_i^2 / ||W||^2."""
    alpha = rotated.abs().mean(1, dtype=torch.float64)
    return float(1 - rotated.shape[1] * alpha.square().sum() / energy)


def _hard_target(rotated: Tensor) -> Tensor:
    """Return T = alpha sign(w') [m, n]."""
    alpha = rotated.abs().mean(1, keepdim=True)
    return torch.where(rotated < 0, -alpha, alpha)


@dataclass(frozen=True)
class _Mixture:
    """In each row two Gaussians of equal weight at +-alpha [m, 1] with one variance [m, 1]; power [m, 1]: mean w'^2."""

    alpha: Tensor
    variance: Tensor
    power: Tensor

    def sign(self, rotated: Tensor) -> Tensor:
        """Return the posterior means of the signs [m, n]."""
        return torch.tanh(self.alpha * rotated / self.variance)

    def target(self, rotated: Tensor) -> Tensor:
        """Return alpha E[sign] / sigma^2 [m, n], up to a factor: rows that are more certain count for more."""
        size = self.power.mean()
        certainty = size / self.variance.clamp_min((size / LOUDEST).clamp_min(torch.finfo(size.dtype).tiny))
        return self.sign(rotated) * self.alpha * certainty

    def likelihood(self, rotated: Tensor) -> float:
        """Return the mean over all weights of log p(w')."""
        ratio = (self.alpha * rotated / self.variance).abs()
        log_cosh = ratio + torch.log1p(torch.exp(-2 * ratio)) - math.log(2)
        rows = log_cosh.mean(1, keepdim=True, dtype=torch.float64)
        rows = rows - ((self.power + self.alpha.square()) / self.variance + (2 * math.pi * self.variance).log()) / 2
        return float(rows.mean())


def _fit_mixture(rotated: Tensor, before: _Mixture | None) -> _Mixture:
    """Return the mixture after one EM step in the basis at hand, from the one before or from rounding's scales."""
    power = rotated.square().mean(1, keepdim=True).clamp_min(torch.finfo(rotated.dtype).tiny)
    if before is None:
        alpha = rotated.abs().mean(1, keepdim=True)
        before = _Mixture(alpha, (power - alpha.square()).clamp_min(VARIANCE_FLOOR * power), power)
    alpha = (before.sign(rotated) * rotated).mean(1, keepdim=True)
    return _Mixture(alpha, (power - alpha.square()).clamp_min(VARIANCE_FLOOR * power), power)


def _polar(M: Tensor) -> Tensor:
    """Return the orthogonal factor of the polar decomposition, the maximiser of tr(Q^T M), through float64."""
    U, _, Vh = torch.linalg.svd(M.double())
    Q: Tensor = U @ Vh
    return Q.to(M.dtype)

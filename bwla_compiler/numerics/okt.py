"""OKT: an orthogonal Kronecker Q = left (x) right under which the rows of W Q are close to +-alpha.

Expectation maximisation over a symmetric mixture of two Gaussians a row. E-step: T = alpha sign(w') (hard; ITQ,
Gong and Lazebnik 2011) or the posterior mean alpha tanh(alpha w' / sigma^2) (soft; the BWLA paper). M-step:
Q1 = polar(sum_i W_i Q2 T_i^T), Q2 = polar(sum_i W_i^T Q1 T_i), with W_i row i as an [n1, n2] matrix. Ours differs
from the paper in the randomised Hadamard start and in the hard E-step by default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.kronecker import apply_kronecker, hadamard

VARIANCE_FLOOR = 1e-3
"""Least sigma^2 of a row in the soft E-step, over its mean square: below it tanh is a sign and EM stalls."""


@dataclass(frozen=True)
class OktFit:
    """A fitted rotation: left [n1, n1], right [n2, n2], None where the identity was kept.

    losses: ||W' - alpha sign(W')||^2 / ||W||^2 at the start and after each iteration.
    """

    left: Tensor | None
    right: Tensor | None
    losses: tuple[float, ...]


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

    W [m, n1 * n2], float32 or float64 -> factors in its dtype, on its device. The losses of hard EM never rise
    (up to rounding). Raises ShapeError where W is not [m, n1 * n2].
    """
    if W.dim() != 2 or W.shape[1] != n1 * n2:
        raise ShapeError(f"weight has shape {list(W.shape)}: expected [out, {n1} * {n2}]")
    left = _start(n1, W, start=start, generator=generator) if fit_left else None
    right = _start(n2, W, start=start, generator=generator) if fit_right else None
    energy = W.square().sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny)
    cube = W.reshape(-1, n1, n2)
    rotated = apply_kronecker(W, left, right)
    losses = [_binary_loss(rotated, energy)]
    spread: Tensor | None = None
    for done in range(iterations if fit_left or fit_right else 0):
        target, spread = _expectation(rotated, soft=soft, spread=spread)
        target = target.reshape_as(cube)
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
    return OktFit(left, right, tuple(losses))


def _start(n: int, W: Tensor, *, start: str, generator: torch.Generator) -> Tensor:
    if start == "identity":
        return torch.eye(n, dtype=W.dtype, device=W.device)
    return hadamard(n, generator=generator).to(W)


def _binary_loss(rotated: Tensor, energy: Tensor) -> float:
    """Return ||W' - alpha sign(W')||^2 / ||W||^2 = 1 - n sum_i alpha_i^2 / ||W||^2."""
    alpha = rotated.abs().mean(1, dtype=torch.float64)
    return float(1 - rotated.shape[1] * alpha.square().sum() / energy)


def _expectation(rotated: Tensor, *, soft: bool, spread: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the target T [m, n] and, if soft, the mixture (alpha, sigma^2) [m, 2] to go on from."""
    alpha = rotated.abs().mean(1, keepdim=True)
    if not soft:
        return torch.where(rotated < 0, -alpha, alpha), None
    power = rotated.square().mean(1, keepdim=True).clamp_min(torch.finfo(rotated.dtype).tiny)
    if spread is None:
        variance = (power - alpha.square()).clamp_min(VARIANCE_FLOOR * power)
    else:
        alpha, variance = spread[:, :1], spread[:, 1:]
    # one M-step of (alpha, sigma^2) in the new basis, then the posterior under it
    alpha = (torch.tanh(alpha * rotated / variance) * rotated).mean(1, keepdim=True)
    variance = (power - alpha.square()).clamp_min(VARIANCE_FLOOR * power)
    return torch.tanh(alpha * rotated / variance) * alpha, torch.cat([alpha, variance], dim=1)


def _polar(M: Tensor) -> Tensor:
    """Return the orthogonal factor of the polar decomposition, the maximiser of tr(Q^T M), through float64."""
    U, _, Vh = torch.linalg.svd(M.double())
    Q: Tensor = U @ Vh
    return Q.to(M.dtype)

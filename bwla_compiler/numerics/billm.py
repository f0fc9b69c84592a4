"""BiLLM's weights (2402.04291) and, with alternating refinements, ARB-LLM's (2410.03129): a plain reading of both.

Blocks of 128 columns, left to right, each one's error fed to the later ones as in GPTQ. In a block the columns of
largest salience w^2 / U_jj^2 (H^-1 = U^T U) take a second binary residual; the weights of the others are split by
magnitude into two groups with a scale each. Every weight so costs two bits, and its scales come on top.
"""

import torch
from torch import Tensor

from bwla_compiler.numerics.hessian import check_hessian, inverse_factor

BLOCK = 128
MOST_SALIENT = 49
PERCENTILES = 81
REFINEMENTS = 15
SCALE_BITS = 16


def billm_weight(W: Tensor, H: Tensor, *, refined: bool = False) -> Tensor:
    """Return the quantized weight [m, n] in floats, in the dtype of W.

    W [m, n], H [n, n] positive definite. refined: means besides scales, alternated REFINEMENTS times (ARB).
    Raises ShapeError, CalibrationError.
    """
    check_hessian(W, H)
    rest = W.clone()
    U = inverse_factor(H.to(W.dtype))
    found = torch.empty_like(W)
    for low in range(0, W.shape[1], BLOCK):
        columns, later = slice(low, low + BLOCK), slice(low + BLOCK, None)
        block, factor = rest[:, columns], U[columns, columns]
        salience = (block.square() / factor.diagonal().square()).sum(0)
        found[:, columns] = _block(block, salience, refined=refined)
        # the errors e of GPTQ's recursion solve sum_{k <= j} e_k U_kj = w_j - q_j
        errors = torch.linalg.solve_triangular(factor, block - found[:, columns], upper=True, left=False)
        rest[:, later] -= errors @ U[columns, later]
    return found


def billm_bits(m: int, n: int, *, refined: bool = False) -> int:
    """Return all stored bits of an [m, n] weight.

    Two bits a weight (sign and group, or sign and residual's sign); for each row and block four scales, and four
    means where refined; one bit a column that says whether it is salient.
    """
    blocks = -(-n // BLOCK)
    values = 8 if refined else 4
    return 2 * m * n + values * SCALE_BITS * m * blocks + n


def _block(W: Tensor, salience: Tensor, *, refined: bool) -> Tensor:
    """Return the block [m, b] with the number of salient columns and then the split that err least."""
    order = salience.argsort(descending=True)
    plain = _binary(W, torch.ones_like(W), refined=False)
    counts = range(1, min(MOST_SALIENT, W.shape[1] - 1) + 1)
    # which columns: with plain scales, as each count's error then sums over columns
    masks = (_columns(order[:count], W) for count in counts)
    salient = min(masks, key=lambda mask: _distance(W, _residual(W, mask, refined=False) + plain * (1 - mask)))
    return _residual(W, salient, refined=refined) + _split(W, 1 - salient, refined=refined)


def _columns(chosen: Tensor, W: Tensor) -> Tensor:
    """Return a mask [1, b] of the chosen columns, 1 and 0 in the dtype of W."""
    return W.new_zeros(1, W.shape[1]).index_fill_(1, chosen, 1)


def _residual(W: Tensor, mask: Tensor, *, refined: bool) -> Tensor:
    """Return two binary terms of the masked columns, zero elsewhere."""
    mask = mask.expand_as(W)
    first = _binary(W, mask, refined=refined)
    return first + _binary(W - first, mask, refined=refined)


def _split(W: Tensor, mask: Tensor, *, refined: bool) -> Tensor:
    """Return a binary term each for the large and the small of the masked weights of a row, at the best percentile."""
    magnitude = W.abs().masked_fill(mask == 0, torch.inf)
    ranked, n_masked = magnitude.sort(1).values, int(mask.sum())
    best, least = torch.zeros_like(W), torch.inf
    places = torch.linspace(0.1, 0.9, PERCENTILES) * (n_masked - 1)
    for place in places.round().int().unique().tolist():
        small = ((magnitude <= ranked[:, place : place + 1]) & (mask > 0)).to(W.dtype)
        large = mask - small
        found = _binary(W, small, refined=refined) + _binary(W, large, refined=refined)
        distance = _distance(W * mask, found)
        if distance < least:
            best, least = found, distance
    return best


def _binary(W: Tensor, mask: Tensor, *, refined: bool) -> Tensor:
    """Return scale * sign (+ mean) of the masked weights of each row, zero elsewhere; mask [m, b] of 0 and 1."""
    count = mask.sum(1, keepdim=True).clamp_min(1)
    if not refined:
        return (W.abs() * mask).sum(1, keepdim=True) / count * torch.where(W < 0, -1, 1) * mask
    mean = (W * mask).sum(1, keepdim=True) / count
    signs = torch.where(mean > W, -1, 1)
    scale = ((W - mean).abs() * mask).sum(1, keepdim=True) / count
    for _ in range(REFINEMENTS):
        mean = ((W - scale * signs) * mask).sum(1, keepdim=True) / count
        scale = ((W - mean) * signs * mask).sum(1, keepdim=True) / count
        signs = torch.where(mean > W, -1, 1)
    return (scale * signs + mean) * mask


def _distance(W: Tensor, found: Tensor) -> float:
    return float((W - found).square().sum(dtype=torch.float64))

"""A literal reading of the BWLA paper's weights: row centring, row and column scales, and a low-rank pair, data-free.

W ~ mean_i + r_i c_j b_ij + (A B)_ij. The pair starts with A Gaussian and B zero; each iteration takes proximal steps
of B and of A in turn towards what the binary part leaves, and a truncated SVD that balances the two. The paper's
step sizes are not public: here the proximal weight is PROXIMITY of the other factor's mean energy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bwla_compiler.numerics.row_column import round_rows_columns

PROXIMITY = 0.1


@dataclass(frozen=True)
class PaperSplit:
    """signs [m, n] int8, row_scale [m, 1], column_scale [n], low_rank_out [m, r + 1], low_rank_in [r + 1, n].

    The last component of the pair is the row mean times ones. losses: ||W - W^||^2 / ||W||^2 after each iteration.
    """

    signs: Tensor
    row_scale: Tensor
    column_scale: Tensor
    low_rank_out: Tensor
    low_rank_in: Tensor
    losses: tuple[float, ...]


def split_as_paper(W: Tensor, *, rank: int, generator: torch.Generator, iterations: int = 20) -> PaperSplit:
    """Return W [m, n] split as in the module's docstring; rank counts the pair without the row mean."""
    rank = min(rank, *W.shape)
    A = torch.randn(W.shape[0], rank, generator=generator).to(W)
    B = W.new_zeros(rank, W.shape[1])
    losses = []
    for _ in range(iterations if rank else 0):
        A, B = _step(W - _binary_part(W - A @ B)[0], A, B)
        left = (W - A @ B - _binary_part(W - A @ B)[0]).square().sum()
        losses.append(float(left / W.square().sum().clamp_min(torch.finfo(W.dtype).tiny)))
    _, mean, signs, row, column = _binary_part(W - A @ B)
    ones = torch.ones_like(column)[None]
    return PaperSplit(signs, row, column, torch.cat([A, mean], 1), torch.cat([B, ones]), tuple(losses))


def _binary_part(W: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what stands for W without the pair, and its parts: mean [m, 1], signs, row and column scale."""
    mean = W.mean(1, keepdim=True)
    signs, row, column = round_rows_columns(W - mean)
    return mean + row * column * signs, mean, signs, row, column


def _step(T: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pair after one proximal step of each factor towards T, balanced by its truncated SVD."""
    B = _proximal(A.mT, T.mT, B.mT).mT
    A = _proximal(B, T, A)
    left, right = torch.linalg.qr(A), torch.linalg.qr(B.mT)
    U, s, Vh = torch.linalg.svd(left.R @ right.R.mT)
    root = s.sqrt()
    return left.Q @ U * root, root[:, None] * (Vh @ right.Q.mT)


def _proximal(B: Tensor, T: Tensor, A: Tensor) -> Tensor:
    """Return the X that minimises ||T - X B||^2 + rho ||X - A||^2; B [r, n], T [m, n], A [m, r]."""
    gram = B @ B.mT
    rho = (PROXIMITY * gram.diagonal().mean()).clamp_min(torch.finfo(B.dtype).tiny)  # also where B is zero
    eye = torch.eye(B.shape[0], dtype=B.dtype, device=B.device)
    solved: Tensor = torch.linalg.solve(gram + rho * eye, (T @ B.mT + rho * A).mT).mT
    return solved

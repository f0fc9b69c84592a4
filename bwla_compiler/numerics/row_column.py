"""Row and column scales of one binary plane, W_ij ~ r_i c_j b_ij, by alternating refinement.

ARB-LLM-RC (2410.03129, section 3.4): with the signs fixed, r_i = sum_j c_j |w_ij| / sum_j c_j^2 and the same for c in
turn; it is the best rank-one fit of |W|, so that the signs stay those of W.
"""

import torch
from torch import Tensor


def round_rows_columns(W: Tensor, *, refinements: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Return (signs [m, n] int8, row scale [m, 1], column scale [n]); the column scales have mean square 1.

    W [m, n]. ||W - r c B||^2 never rises with the refinements. A zero column has scale 0.
    """
    tiny = torch.finfo(W.dtype).tiny
    magnitude = W.abs()
    column = torch.ones_like(W[0])
    for _ in range(refinements):
        row = magnitude @ column / column.square().sum().clamp_min(tiny)
        column = row @ magnitude / row.square().sum().clamp_min(tiny)
    size = column.square().mean().sqrt().clamp_min(tiny)
    column = column / size
    row = magnitude @ column / column.square().sum().clamp_min(tiny)
    return torch.where(W < 0, -1, 1).to(torch.int8), row[:, None], column

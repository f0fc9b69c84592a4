"""Signs and one scale per row and group of columns: W_ij ~ a_ig b_ij, by rounding or by descent on a Hessian.

The descent is that of `signs`, column by column with the scale of the column's group; the scales a_i of a row, the
signs fixed, are the least squares fit M a = c with M_gk = b_g H b_k^T and c_g = b_g H w^T, b_g the signs of group g
with zeros elsewhere.
"""

import torch
from torch import Tensor

from bwla_compiler.numerics.feedback import gptq_signs
from bwla_compiler.numerics.hessian import check_hessian
from bwla_compiler.numerics.signs import visit_block

RIDGE = 1e-6
"""Added to M over its mean diagonal: groups that no input tells apart then share the scale evenly."""


def round_groups(W: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
    """Return (signs [m, n] int8, scale [m, groups]) of plain rounding: mean |w| of each row and group.

    W [m, n]; the last group may be narrower.
    """
    scale = torch.stack([part.abs().mean(1, dtype=torch.float64).to(W.dtype) for part in W.split(group, 1)], 1)
    return torch.where(W < 0, -1, 1).to(torch.int8), scale


def descend_groups(
    W: Tensor, H: Tensor, *, group: int, signs: Tensor | None = None, sweeps: int = 4
) -> tuple[Tensor, Tensor]:
    """Return (signs [m, n] int8, scale [m, groups] positive) that lower tr((W - A*B) H (W - A*B)^T).

    W [m, n]; H [n, n] symmetric positive definite; signs: the start, GPTQ's by default. The objective never rises
    from sweep to sweep, up to RIDGE. float64 stays float64, all else runs in float32. Raises ShapeError,
    CalibrationError.
    """
    check_hessian(W, H)
    dtype = torch.promote_types(W.dtype, torch.float32)
    H = H.to(dtype)
    start = gptq_signs(W, H) if signs is None else signs
    B = start.mT.to(dtype, copy=True).contiguous()  # columns as contiguous rows, here and below
    WH = H @ W.mT.to(dtype)
    scale = _group_scales(B, WH, H, group=group)
    for _ in range(sweeps):
        changed = _sweep(B, WH, H, scale, group=group)
        scale = _group_scales(B, WH, H, group=group)
        if not changed:
            break
    return B.mT.to(torch.int8).contiguous(), scale.mT.contiguous()


def _group_scales(B: Tensor, WH: Tensor, H: Tensor, *, group: int) -> Tensor:
    """Return the best scales [groups, m], made positive by flipping, in place, the signs of groups below zero."""
    parts = [slice(low, min(low + group, B.shape[0])) for low in range(0, B.shape[0], group)]
    M = B.new_empty(B.shape[1], len(parts), len(parts))
    for k, columns in enumerate(parts):
        image = H[:, columns] @ B[columns]
        for g, rows in enumerate(parts):
            M[:, g, k] = (B[rows] * image[rows]).sum(0)
    c = torch.stack([(B[rows] * WH[rows]).sum(0) for rows in parts], 1)
    M.diagonal(dim1=1, dim2=2).add_(RIDGE * M.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    scale: Tensor = torch.linalg.solve(M.double(), c.double()).to(B.dtype).mT
    for g, rows in enumerate(parts):
        B[rows] *= torch.where(scale[g] < 0, -1, 1)
    return scale.abs()


def _sweep(B: Tensor, WH: Tensor, H: Tensor, scale: Tensor, *, group: int) -> bool:
    """Visit each row of B [n, m] once, in place; return whether any sign changed."""
    tiny = torch.finfo(B.dtype).tiny
    image = H @ (B * scale.repeat_interleave(group, 0)[: B.shape[0]])
    changed = False
    for g, low in enumerate(range(0, B.shape[0], group)):
        rows = slice(low, low + group)
        gradient = (image[rows] - WH[rows]) / scale[g].clamp_min(tiny)
        signs = visit_block(gradient, B[rows], H[rows, rows])
        delta = signs - B[rows]
        if delta.any():
            changed = True
            B[rows] = signs
            image.addmm_(H[:, rows], delta * scale[g])
    return changed

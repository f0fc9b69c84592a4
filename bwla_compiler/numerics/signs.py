"""Signs and row scales of one binary plane: W ~ scale * signs, by rounding or by descent on a Hessian.

Descent: exact coordinate descent on tr((W - aB) H (W - aB)^T) over b_ij in {-1, +1}. For one row the best b_j, the
others fixed, is sign(R_j + a b_j H_jj) with R = (W - aB) H; the scale has the closed form (b H w) / (b H b).
Rows are independent and run together; columns run in blocks, so that the update of R is a matrix product.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.columns import visit_columns
from bwla_compiler.numerics.feedback import gptq_signs
from bwla_compiler.numerics.hessian import check_hessian


def row_scale(W: Tensor) -> Tensor:
    """Return the scale s that minimises ||W - s*sign(W)||^2 in each row.

    W [m, n] -> s [m, 1], in units of W. Closed form: mean |W| (XNOR-Net, section 3.1).
    Raises ShapeError where W is not a matrix.
    """
    if W.dim() != 2:
        raise ShapeError(f"weight has shape {list(W.shape)}: expected a matrix [out, in]")
    return W.abs().mean(1, keepdim=True, dtype=torch.float64).to(W.dtype)


def round_signs(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return (signs [m, n] int8, scale [m, 1]) of plain rounding; a zero weight becomes +1."""
    return torch.where(W < 0, -1, 1).to(torch.int8), row_scale(W)


def weighted_scale(W: Tensor, signs: Tensor, H: Tensor) -> Tensor:
    """Return the scale [m, 1] that minimises (w - a b) H (w - a b)^T in each row: (b H w) / (b H b).

    W [m, n], signs [m, n] of any dtype, H [n, n] positive definite. It may be negative. Raises ShapeError.
    """
    check_hessian(W, H)
    B = signs.mT.to(W.dtype)
    return _scale(B, H @ W.mT, H @ B)[:, None]


def descend_signs(
    W: Tensor,
    H: Tensor,
    *,
    signs: Tensor | None = None,
    sweeps: int = 4,
    block: int = 128,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (signs [m, n] int8, scale [m, 1] positive) that lower tr((W - aB) H (W - aB)^T).

    W [m, n]; H [n, n] symmetric positive definite; signs: the start, GPTQ's by default. The objective never rises
    from sweep to sweep; the loop stops early at a point that no single flip improves. float64 stays float64, all
    else runs in float32. Memory: three [m, n] besides W and H. Raises ShapeError, CalibrationError.
    """
    check_hessian(W, H)
    dtype = torch.promote_types(W.dtype, torch.float32)
    H = H.to(dtype)
    start = gptq_signs(W, H, block=block) if signs is None else signs
    B = start.mT.to(dtype, copy=True).contiguous()  # columns as contiguous rows, here and below
    WH = H @ W.mT.to(dtype)
    BH = H @ B
    scale = _positive_scale(B, WH, BH)
    for done in range(sweeps):
        changed = _sweep(B, WH, BH, H, scale, block=block)
        scale = _positive_scale(B, WH, BH)
        if progress:
            progress("sign descent", done + 1, sweeps)
        if not changed:
            break
    return B.mT.to(torch.int8).contiguous(), scale[:, None].to(torch.promote_types(W.dtype, torch.float32))


def _scale(B: Tensor, WH: Tensor, BH: Tensor) -> Tensor:
    """Return (b H w) / (b H b) [m] from the products with H; all [n, m]."""
    return (B * WH).sum(0) / (B * BH).sum(0).clamp_min(torch.finfo(B.dtype).tiny)


def _positive_scale(B: Tensor, WH: Tensor, BH: Tensor) -> Tensor:
    """Return |a| [m]; flip, in place, the columns [n] where a is negative, which leaves a*B as it was."""
    scale = _scale(B, WH, BH)
    if (scale < 0).any():
        flip = torch.where(scale < 0, -1, 1)
        B.mul_(flip)
        BH.mul_(flip)
    return scale.abs()


def _sweep(B: Tensor, WH: Tensor, BH: Tensor, H: Tensor, scale: Tensor, *, block: int) -> bool:
    """Visit each row of B [n, m] once, in place in B and BH; return whether any sign changed."""
    inverse = 1 / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    changed = False
    for low in range(0, B.shape[0], block):
        rows = slice(low, low + block)
        # -R / a: dividing by a > 0 keeps every sign and spares a product per column
        gradient = torch.addcmul(BH[rows], WH[rows], inverse, value=-1)
        signs = visit_block(gradient, B[rows], H[rows, rows])
        delta = signs - B[rows]
        if delta.any():
            changed = True
            B[rows] = signs
            BH.addmm_(H[:, rows], delta)
    return changed


def visit_block(gradient: Tensor, signs: Tensor, H: Tensor) -> Tensor:
    """Return the signs [b, m] after one sequential pass over b columns.

    gradient [b, m] = -R / a as it was before the block, overwritten; H [b, b]. A sign becomes that of minus the
    gradient without its own term; where that is zero, either is as good.
    """
    # less the terms of the column itself and of those before it, which the pass puts back as they become
    gradient.addmm_(H.triu().mT, signs, beta=-1)
    one = torch.ones_like(gradient[0])
    return visit_columns(gradient, -H, lambda j, column, sign: torch.copysign(one, column, out=sign))

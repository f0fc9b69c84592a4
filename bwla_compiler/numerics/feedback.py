"""GPTQ at one bit (Frantar et al., 2210.17323): greedy column feedback, here only the start of sign descent.

Alone it is worse than rounding at one bit, because the quantiser +-alpha saturates.
"""

import torch
from torch import Tensor

from bwla_compiler.numerics.columns import visit_columns
from bwla_compiler.numerics.hessian import check_hessian, inverse_factor


def gptq_signs(W: Tensor, H: Tensor, *, block: int = 128) -> Tensor:
    """Return signs [m, n] int8 chosen column by column, each column's error fed to the later ones.

    W [m, n], H [n, n] positive definite. Row scales stay mean |w|. Raises ShapeError, CalibrationError.
    """
    check_hessian(W, H)
    work = W.float() if W.dtype != torch.float64 else W
    U = inverse_factor(H.to(work.dtype))
    alpha = work.abs().mean(1)
    columns = work.mT.clone(memory_format=torch.contiguous_format)  # a column of W is a contiguous row here
    signs = torch.empty(columns.shape, dtype=torch.int8, device=W.device)
    for low in range(0, W.shape[1], block):
        high = min(low + block, W.shape[1])
        errors = _quantize_block(columns[low:high], signs[low:high], U[low:high, low:high], alpha)
        columns[high:].addmm_(U[low:high, high:].mT, errors)
    return signs.mT.contiguous()


def _quantize_block(columns: Tensor, signs: Tensor, U: Tensor, alpha: Tensor) -> Tensor:
    """Fill signs [b, m]; return the errors (q - w) / U_jj [b, m] of one sequential pass."""
    inverse: list[float] = U.diagonal().reciprocal().tolist()

    def decide(j: int, column: Tensor) -> Tensor:
        quantized = torch.where(column < 0, -alpha, alpha)
        signs[j] = torch.where(column < 0, -1, 1)
        return (quantized - column).mul(inverse[j])

    return visit_columns(columns, U, decide)

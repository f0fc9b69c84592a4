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
        errors = _quantize_block(columns[low:high], U[low:high, low:high], alpha)
        signs[low:high] = torch.where(columns[low:high].signbit(), -1, 1)
        columns[high:].addmm_(U[low:high, high:].mT, errors)
    return signs.mT.contiguous()


def _quantize_block(columns: Tensor, U: Tensor, alpha: Tensor) -> Tensor:
    """Return the errors (q - w) / U_jj [b, m] of one sequential pass; columns [b, m] become the w that were rounded.

    Each w is divided by its U_jj > 0 throughout the pass, which keeps its sign and spares a product per column.
    """
    diagonal = U.diagonal()
    columns /= diagonal[:, None]
    targets = (alpha / diagonal[:, None]).unbind(0)

    def decide(j: int, column: Tensor, error: Tensor) -> None:
        torch.copysign(targets[j], column, out=error).sub_(column)

    return visit_columns(columns, U / diagonal, decide)

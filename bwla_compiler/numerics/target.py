"""The drift-corrected target: the weight that on the quantized stream gives what the fp stream gave.

With T = (Xf - Xq) W^T (plus the residual's drift for its writers), the least squares fit of T on Xq is
(T^T Xq) (Xq^T Xq)^-1, here damped towards no correction.
"""

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.hessian import check_hessian, cholesky


def drift_corrected(W: Tensor, gram: Tensor, cross: Tensor, *, damping: float) -> Tensor:
    """Return W + cross (gram + damping * mean(diag gram) * I)^-1, solved in float64, in the dtype of W.

    W [m, n]; gram [n, n] = Xq^T Xq / N; cross [m, n] = T^T Xq / N. Raises ShapeError, and CalibrationError
    where the damped gram is not positive definite.
    """
    check_hessian(W, gram)
    if cross.shape != W.shape:
        raise ShapeError(f"cross moment {list(cross.shape)}: expected the weight's {list(W.shape)}")
    damped = gram.to(torch.float64, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    correction = torch.cholesky_solve(cross.double().mT, cholesky(damped)).mT
    return (W.double() + correction).to(W.dtype)

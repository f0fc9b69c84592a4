"""Cholesky factors of a Hessian H = X^T X / N + damping, with a retry in float64."""

import torch
from torch import Tensor

from bwla_compiler.errors import CalibrationError, ShapeError


def check_hessian(W: Tensor, H: Tensor) -> None:
    """Raise ShapeError unless W is [m, n] and H [n, n]."""
    if W.dim() != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ShapeError(f"weight {list(W.shape)} and Hessian {list(H.shape)}: expected [out, in] and [in, in]")


def cholesky(H: Tensor) -> Tensor:
    """Return the lower factor C, H = C C^T, [n, n] in the dtype of H.

    Raises CalibrationError where H is not positive definite, even in float64.
    """
    C: Tensor
    C, info = torch.linalg.cholesky_ex(H)
    if info.item() == 0:
        return C
    C, info = torch.linalg.cholesky_ex(H.double())
    if info.item() != 0:
        raise CalibrationError(
            f"the Hessian of {H.shape[0]} inputs is not positive definite (pivot {info.item()}); "
            "raise the damping, or give more calibration tokens"
        )
    return C.to(H.dtype)


def inverse_factor(H: Tensor) -> Tensor:
    """Return the upper U with H^-1 = U^T U, [n, n]; no inverse of H is formed.

    With J the reversal, J H J = L L^T gives H = V V^T for the upper V = J L J, hence U = V^-1.
    """
    V = cholesky(H.flip(0, 1)).flip(0, 1)
    eye = torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    U: Tensor = torch.linalg.solve_triangular(V, eye, upper=True)
    return U

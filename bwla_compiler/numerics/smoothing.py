"""Diagonal smoothing (SmoothQuant, 2211.10438, equation 4): move activation outliers into the weights."""

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError

FLOOR = 1e-4
"""Least magnitude of a channel, over the largest one: a channel that was silent in calibration may still speak."""


def smoothing_scale(x_max: Tensor, w_max: Tensor, *, exponent: float) -> Tensor:
    """Return s [n], s_j = x_max_j^e / w_max_j^(1 - e), geometric mean 1; then x <- x / s and W <- W * s.

    x_max, w_max [n]: largest magnitude of each input channel in the activations and in the weights that read it.
    exponent 0 is off: ones. Computed in float64, returned in the dtype of x_max. Raises ShapeError.
    """
    if x_max.dim() != 1 or x_max.shape != w_max.shape:
        raise ShapeError(f"channel maxima {list(x_max.shape)} and {list(w_max.shape)}: expected two equal vectors")
    if exponent == 0:
        return torch.ones_like(x_max)
    log_scale = exponent * _floored(x_max).log() - (1 - exponent) * _floored(w_max).log()
    return (log_scale - log_scale.mean()).exp().to(x_max.dtype)


def _floored(maxima: Tensor) -> Tensor:
    """Return maxima in float64, none below FLOOR of the largest; ones where all are zero."""
    maxima = maxima.double()
    largest = maxima.max()
    return maxima.clamp_min(FLOOR * largest) if largest > 0 else torch.ones_like(maxima)

"""TransformedLinear: a float linear behind an online change of basis, computing what it did before."""

import torch
from torch import Tensor, nn

from bwla_compiler.numerics.kronecker import apply_kronecker
from bwla_compiler.runtime.online import OnlineTransform


class TransformedLinear(nn.Module):
    """x -> W' (x T) with W' = W T^-T, T = diag(scale)(left (x) right): the same function as the linear alone.

    transform: T as it is stored, rounding included, so that W' undoes exactly what will run. linear: an
    nn.Linear or Conv1D of [in, out] features; its values are copied. weight: W' as [out, in].
    """

    def __init__(self, transform: OnlineTransform, linear: nn.Module, *, in_axis: int = 1) -> None:
        super().__init__()
        self.transform = transform
        weight = linear.get_parameter("weight").detach().movedim(in_axis, -1)
        bias = getattr(linear, "bias", None)
        self.weight = nn.Parameter(counter_rotated(weight, transform), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], dtype of x."""
        return nn.functional.linear(self.transform(x), self.weight, self.bias)


def counter_rotated(weight: Tensor, transform: OnlineTransform) -> Tensor:
    """Return W T^-T [out, in] in the dtype of W, through float64: what undoes a transform T of the input."""
    scale, left, right = (None if f is None else f.to(torch.float64) for f in transform.factors())
    rows = weight.to(torch.float64)
    if scale is not None:
        rows = rows / scale
    inverse = [None if f is None else torch.linalg.inv(f).T.contiguous() for f in (left, right)]
    return apply_kronecker(rows, inverse[0], inverse[1]).to(weight.dtype)

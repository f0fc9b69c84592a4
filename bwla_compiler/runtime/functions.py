"""Norms and activation functions of packed models as operators: compiled or not, on a CPU one code computes them.

Torch's own differ from the fused kernels' in the order of sums and in the last bits of exp. What reads them rounds
activations to a few bits, so that such a difference grows to a hundredth of a logit where one falls to the other side.
"""

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from bwla_compiler.runtime import ops, portable
from bwla_compiler.runtime.anchors import Anchored, anchors_serve
from bwla_compiler.runtime.sealed import Sealed, unedited

assert ops.LIBRARY is not None  # defines the operators

PROLOGUE, PROLOGUE_OF = torch.ops.bwla.prologue.default, torch.ops.bwla.prologue_of.default

NORMS = ("rms_norm", "layer_norm")
ACTIVATIONS = tuple(portable.ACTIVATIONS)


class Norm(Anchored):
    """y = norm(x) * (weight + offset) + bias over the last dimension, in float32, rounded once to the dtype of x.

    kind: of NORMS. weight, bias [n] or None. offset: 1 where a family stores the gain less 1. On other devices than a
    CPU it is plain torch, which Inductor fuses with its neighbours.
    """

    def __init__(
        self, kind: str, eps: float, weight: nn.Parameter | None, bias: nn.Parameter | None, *, offset: float = 0.0
    ) -> None:
        super().__init__()
        self.kind, self.eps, self.offset = kind, eps, offset
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.seal()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., n], dtype of x. Raises GradientError where a gradient is asked for."""
        if is_dynamo_compiling() and anchors_serve() and x.device.type == "cpu" and not self.offset:
            result: Tensor = PROLOGUE_OF(x, self.anchor, self.facts, self.kind, self.eps)
            return result
        unedited(self)
        gain, shift = self._parameters["weight"], self._parameters["bias"]
        if gain is None or not self.offset:
            return _computed(x, self.kind, self.eps, gain, shift)
        return _computed(x, self.kind, self.eps, gain.float() + self.offset, shift)

    def extra_repr(self) -> str:
        return f"{self.kind}, eps={self.eps:g}" + (f", offset={self.offset:g}" if self.offset else "")


class Activation(Sealed):
    """y = f(x), f one of ACTIVATIONS, in float32, rounded once to the dtype of x."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.seal()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., n], dtype of x. Raises GradientError where a gradient is asked for."""
        unedited(self)
        return _computed(x, self.kind, 0.0, None, None)

    def extra_repr(self) -> str:
        return self.kind


def _computed(x: Tensor, kind: str, eps: float, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    if not x.is_cpu:
        return portable.prologue(x, portable.Prologue(kind, eps, gain, shift)).to(x.dtype)
    result: Tensor = PROLOGUE(x, kind, eps, gain, shift)
    return result

"""QuantizeLinears: float linears become packed 1-bit linears."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bwla_compiler.numerics.planes import BinaryWeight, SimulatedWeight
from bwla_compiler.passes.base import PassContext, PassReport, ReplaceModule
from bwla_compiler.runtime.modules import OnlineTransform, PackedLinear, SimulatedLinear
from bwla_compiler.runtime.transformed import TransformedLinear


@dataclass(frozen=True)
class QuantizeLinears:
    """Replace linears by what was fitted for them: binary planes, scales, a low-rank pair.

    A weight that no packed format holds becomes a simulated linear. weights: by linear, each [out, in] in the basis that the linear reads now. activation_bits: by linear.
    """

    weights: Mapping[str, BinaryWeight | SimulatedWeight]
    activation_bits: Mapping[str, int]
    name: ClassVar[str] = "quantize-linears"

    def run(self, ctx: PassContext) -> PassReport:
        """Emit one replacement per fitted linear; the others are left alone with the plan's reason."""
        report = PassReport(self.name)
        for linear in ctx.plan.linears:
            if linear.name not in self.weights:
                continue
            module = ctx.model.get_submodule(linear.name)
            if isinstance(module, (PackedLinear, SimulatedLinear)):
                report.skip(linear.name, "already packed")
                continue
            quantized = _quantized(
                self.weights[linear.name],
                activation_bits=self.activation_bits[linear.name],
                transform=module.transform if isinstance(module, TransformedLinear) else None,
                bias=getattr(module, "bias", None),
            )
            report.change(linear.name, ReplaceModule(linear.name, quantized))
        return report


def _quantized(
    weight: BinaryWeight | SimulatedWeight, *, activation_bits: int, transform: OnlineTransform | None, bias: Tensor | None
) -> PackedLinear | SimulatedLinear:
    if isinstance(weight, SimulatedWeight):
        return SimulatedLinear(weight, activation_bits=activation_bits, transform=transform, bias=bias)
    return PackedLinear.from_binary(weight, activation_bits=activation_bits, transform=transform, bias=bias)

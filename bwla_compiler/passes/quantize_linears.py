"""QuantizeLinears: float linears become packed 1-bit linears."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from bwla_compiler.graph.plan import Linear
from bwla_compiler.numerics.planes import BinaryWeight, SimulatedWeight
from bwla_compiler.passes.base import PassContext, PassReport, ReplaceModule
from bwla_compiler.runtime.experts import PackedExperts, TransformedExperts
from bwla_compiler.runtime.modules import PackedLinear, SimulatedLinear
from bwla_compiler.runtime.transformed import TransformedLinear


@dataclass(frozen=True)
class QuantizeLinears:
    """Replace linears by what was fitted for them: binary planes, scales, a low-rank pair.

    A weight that no packed format holds becomes a simulated linear. weights: by linear, each [out, in] in the basis
    that the linear reads now; of experts, one each. activation_bits: by linear.
    """

    weights: Mapping[str, BinaryWeight | SimulatedWeight | Sequence[BinaryWeight]]
    activation_bits: Mapping[str, int]
    name: ClassVar[str] = "quantize-linears"

    def run(self, ctx: PassContext) -> PassReport:
        """Emit one replacement per fitted linear; the others are left alone with the plan's reason."""
        report = PassReport(self.name)
        for linear in ctx.plan.linears:
            if linear.name not in self.weights:
                continue
            module = module_or_none(ctx.model, linear)
            if isinstance(module, (PackedLinear, PackedExperts, SimulatedLinear)):
                report.skip(linear.name, "already packed")
            else:
                report.change(linear.name, ReplaceModule(linear.name, self._packed(linear.name, module)))
        return report

    def _packed(self, name: str, module: nn.Module | None) -> nn.Module:
        weight, bits = self.weights[name], self.activation_bits[name]
        transform = module.transform if isinstance(module, (TransformedLinear, TransformedExperts)) else None
        if isinstance(weight, SimulatedWeight):
            bias = getattr(module, "bias", None)
            return SimulatedLinear(weight, activation_bits=bits, transform=transform, bias=bias)
        if not isinstance(weight, BinaryWeight):
            return PackedExperts.from_binary(weight, activation_bits=bits, transform=transform)
        assert module is not None, f"{name} is no module"
        return PackedLinear.from_binary(
            weight,
            activation_bits=bits,
            transform=transform,
            bias=getattr(module, "bias", None),
            dtype=module.get_parameter("weight").dtype,
        )


def module_or_none(model: nn.Module, linear: Linear) -> nn.Module | None:
    """Return the module that a linear of the plan is now; None for experts that are still a parameter."""
    owner, _, leaf = linear.name.rpartition(".")
    if linear.experts and leaf in model.get_submodule(owner)._parameters:
        return None
    return model.get_submodule(linear.name)

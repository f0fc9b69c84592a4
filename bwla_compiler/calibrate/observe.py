"""Observer: how weights and inputs are spread before anything is done to a model, and as they are quantized.

Samples alone are looked at: of each matrix, and of a few sequences of calibration, which take one more forward pass of
the float model where that is in memory. Where weights come block by block, each is looked at when it comes, and inputs
are seen as they are quantized alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bwla_compiler.graph.plan import Linear, Plan
from bwla_compiler.numerics.distribution import TOKEN_SAMPLE, tails, weight_spread
from bwla_compiler.numerics.spread import Spread, Tails, WeightSpread
from bwla_compiler.spec import FLOAT_BITS

ROUNDED = 6
"""Bits that inputs are measured with where the recipe leaves them in floats: what rounding would lose."""


class Observer:
    """Gathers the spread of each quantized linear. bits: of the rounded inputs."""

    def __init__(self, plan: Plan, *, bits: int) -> None:
        self.bits = bits if bits < FLOAT_BITS else ROUNDED
        self._plan = plan
        self._of_parameter = {x.parameter: x for x in plan.linears}
        self._weights_before: dict[str, WeightSpread] = {}
        self._inputs_before: dict[str, Tails] = {}
        self._weights_after: dict[str, WeightSpread] = {}
        self._inputs_after: dict[str, Tails] = {}

    def see_original(self, parameter: str, values: Tensor) -> None:
        """Take a parameter of the float model, before anything is done to it; the first time counts."""
        linear = self._of_parameter.get(parameter)
        if linear is None or linear.name in self._weights_before or values.is_meta or not values.numel():
            return
        self._weights_before[linear.name] = weight_spread(values.movedim(linear.in_axis, -1))

    def see_inputs(self, model: nn.Module, tokens: Tensor) -> None:
        """Run TOKEN_SAMPLE of tokens [sequences, length] int64 through the float model: what its plain linears read."""
        modules = dict(model.named_modules())
        wanted = {x.name: modules[x.name] for x in self._plan.linears if not x.experts and x.name in modules}
        handles = [m.register_forward_pre_hook(partial(self._note, name)) for name, m in wanted.items()]
        try:
            with torch.no_grad():
                model(input_ids=tokens[: max(1, TOKEN_SAMPLE // tokens.shape[1])], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel() and not args[0].is_meta:
            self._inputs_before.setdefault(name, tails(args[0].flatten(0, -2), bits=self.bits))

    def see_weight(self, linear: Linear, weight: Tensor) -> None:
        """Take the weight [.., out, in] that is about to be quantized, in the basis that it reads."""
        if not weight.is_meta and weight.numel():
            self._weights_after[linear.name] = weight_spread(weight)

    def see_input(self, linears: Sequence[Linear], x: Tensor) -> None:
        """Take tokens x [tokens, in] that linears will read, before rounding."""
        found = tails(x, bits=self.bits)
        self._inputs_after.update((linear.name, found) for linear in linears)

    def spread(self, linear: Linear) -> Spread:
        """Return what was seen of one linear."""
        name = linear.name
        return Spread(
            self._weights_before.get(name),
            self._weights_after.get(name),
            self._inputs_before.get(name),
            self._inputs_after.get(name),
        )

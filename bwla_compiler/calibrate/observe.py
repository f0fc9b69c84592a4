"""Observer: how weights and inputs are spread before anything is done to a model, and as they are quantized.

Samples alone are looked at: of each matrix, and of a few sequences of calibration, which take one more forward pass of
the float model. Weights that are not there yet (on meta) are left out.
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
    """Gathers the spread of each quantized linear; at construction, of the float model as it is.

    tokens [sequences, length] int64: calibration, of which TOKEN_SAMPLE tokens are used; None leaves inputs out.
    bits: of the rounded inputs.
    """

    def __init__(self, model: nn.Module, plan: Plan, tokens: Tensor | None, *, bits: int) -> None:
        self.bits = bits if bits < FLOAT_BITS else ROUNDED
        self._weights_before = {x.name: found for x in plan.linears if (found := _weight(model, x)) is not None}
        self._inputs_before = {} if tokens is None else self._inputs(model, plan, tokens)
        self._weights_after: dict[str, WeightSpread] = {}
        self._inputs_after: dict[str, Tails] = {}

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

    def _inputs(self, model: nn.Module, plan: Plan, tokens: Tensor) -> dict[str, Tails]:
        """Return the tails of what plain linears read in one forward pass; those with weights on meta are not run."""
        if any(p.is_meta for p in model.parameters()):
            return {}
        modules = dict(model.named_modules())
        wanted = {x.name: modules[x.name] for x in plan.linears if not x.experts and x.name in modules}
        found: dict[str, Tails] = {}
        handles = [m.register_forward_pre_hook(partial(self._note, found, name)) for name, m in wanted.items()]
        try:
            with torch.no_grad():
                model(input_ids=tokens[: max(1, TOKEN_SAMPLE // tokens.shape[1])], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _note(self, found: dict[str, Tails], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel():
            found.setdefault(name, tails(args[0].flatten(0, -2), bits=self.bits))


class Unobserved:
    """In an observer's place where weights come block by block: nothing is looked at."""

    def see_weight(self, linear: Linear, weight: Tensor) -> None:
        """Look away."""

    def see_input(self, linears: Sequence[Linear], x: Tensor) -> None:
        """Look away."""

    def spread(self, linear: Linear) -> None:
        """Return None: nothing was seen."""


def _weight(model: nn.Module, linear: Linear) -> WeightSpread | None:
    """Return the spread of a linear's weight, rows along its inputs; None where it is not there."""
    weight = model.get_parameter(linear.parameter)
    return None if weight.is_meta or not weight.numel() else weight_spread(weight.movedim(linear.in_axis, -1))

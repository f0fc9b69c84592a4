"""Which change of basis a group can afford at run time: Kronecker factors, Hadamard blocks, or none."""

import dataclasses
from dataclasses import dataclass

from bwla_compiler.cost.devices import Device
from bwla_compiler.cost.roofline import region_cost
from bwla_compiler.spec import LinearSpec, TransformSpec

LARGEST_BLOCK = 128
"""Side of a Hadamard factor that stands alone: blocks of channels, each turned by itself."""

SMALLEST_BLOCK = 4
"""Below, a block mixes too few channels to spread an outlier."""


@dataclass(frozen=True)
class Choice:
    """What a group gets, the modelled share of its time, and why it is not more, "" where it is all it could be."""

    transform: TransformSpec
    share: float
    reason: str = ""


def transform_share(spec: LinearSpec, *, device: Device, tokens: int = 1) -> float:
    """Return the modelled share of a group's time that its change of basis takes, rounding left out: 0 to 1."""
    plain = dataclasses.replace(spec, transform=TransformSpec())
    seconds, without = (region_cost(s, tokens=tokens, device=device).seconds for s in (spec, plain))
    return max(0.0, 1 - without / seconds)


def choose_transform(spec: LinearSpec, *, budget: float, device: Device, tokens: int = 1) -> Choice:
    """Return the change of basis that takes at most `budget` of a group's modelled time on a device.

    spec: with the transform that the recipe asks for. In order: that one; where it turns the whole input, a Hadamard
    factor alone on blocks of channels, the largest that is affordable; none. A budget of 1 affords everything.
    """
    wanted = spec.transform
    share = transform_share(spec, device=device, tokens=tokens)
    if share <= budget or budget >= 1:
        return Choice(wanted, share)
    reason = f"the {wanted.n1} x {wanted.n2} {wanted.kind} takes {share:.0%} of the modelled time on {device.name}"
    for side in _block_sides(spec.in_features) if wanted.left and wanted.right else ():
        block = TransformSpec("hadamard", spec.in_features // side, side, right=True, scaled=wanted.scaled, signed=True)
        cheaper = transform_share(dataclasses.replace(spec, transform=block), device=device, tokens=tokens)
        if cheaper <= budget:
            return Choice(block, cheaper, f"{reason}, blocks of {side} channels {cheaper:.0%}")
    return Choice(TransformSpec(), 0.0, f"{reason}, more than the budget of {budget:.0%}")


def _block_sides(n: int) -> list[int]:
    """Return the sides of blocks that divide n, powers of two, the largest first."""
    sides = [1 << k for k in range(SMALLEST_BLOCK.bit_length() - 1, LARGEST_BLOCK.bit_length())]
    return [side for side in reversed(sides) if n % side == 0]

"""Sizes of Kronecker factors: of all n1 * n2 = n that GPU kernels hold, the pair of least modelled time.

That is the most square one that they hold. The one next to sqrt(n) may spill, since sides are padded to powers of two
(160 x 160 to 256 x 256).
"""

import math
from functools import cache

from bwla_compiler.errors import ShapeError

LONGEST = 5
"""Side of a Hadamard factor, at most, over the square root of the channels: a GPU multiplies by it as by any matrix."""

LARGEST_TILE = 32768
"""Channels that one program holds: 64 float32 registers a thread in 16 warps. Beyond, registers spill."""

LARGEST_WHOLE = 128
"""Side of the Kronecker factor that is held whole: 64 KB of shared memory in float32."""

SMALLEST_SIDE = 16
"""Of a matrix product on a GPU: smaller sides are padded to it."""


def power_of_two(n: int, *, least: int = SMALLEST_SIDE) -> int:
    """Return the smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def holds(n1: int, n2: int, *, both: bool = True) -> bool:
    """Whether one GPU program holds a token of n1 * n2 channels and, where there are both, the smaller factor."""
    sides = power_of_two(n1), power_of_two(n2)
    return sides[0] * sides[1] <= LARGEST_TILE and (not both or min(sides) <= LARGEST_WHOLE)


@cache
def kronecker_factors(n: int) -> tuple[int, int]:
    """Return (n1, n2), n1 <= n2, n1 * n2 == n: of least modelled time among the pairs that a GPU program holds.

    Time and bytes of factors both rise with n1 + n2 for a fixed product, so that the most square pair is the best on
    every device. Where none is held, or only pairs that take twice the operations, the most square one of all: such
    inputs run on the unfused path. Raises ShapeError where n < 1.
    """
    if n < 1:
        raise ShapeError(f"cannot factor {n} channels: at least 1 is needed")
    pairs = [(d, n // d) for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    best = min(pairs, key=sum)
    held = min((p for p in pairs if holds(*p)), key=sum, default=best)
    return held if sum(held) <= 2 * sum(best) else best


@cache
def hadamard_factors(n: int) -> tuple[int, int] | None:
    """Return (n1, n2) with n1 * n2 == n and n2 the longest power of two that a GPU program holds beside n1.

    CPU kernels apply a Hadamard factor by log2(n2) additions, so that n1 alone is what a transform costs. Where no pair
    is held, the longest of all, as for `kronecker_factors`; None where the pair would not be cheaper than its.
    """
    sides = [1 << k for k in range(1, n.bit_length()) if n % (1 << k) == 0 and (1 << 2 * k) <= LONGEST**2 * n]
    square = kronecker_factors(n)
    held = [side for side in sides if holds(n // side, side) or not holds(*square)]
    n2 = max(held, default=1)
    n1 = n // n2
    return (n1, n2) if n1 + n2.bit_length() < sum(square) else None

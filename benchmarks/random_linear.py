"""Linears of random signs and row scales, and random transforms before them, as kernels are timed with."""

from typing import Literal

import torch

from bwla_compiler.numerics.kronecker import random_signs
from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.runtime.modules import PackedLinear
from bwla_compiler.runtime.online import OnlineTransform


def random_linear(shape: tuple[int, int], bits: int) -> PackedLinear:
    """Return a linear [out, in] of random signs and row scales that rounds to `bits`, always the same."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(1, shape[0], 1, generator=generator) + 0.5
    binary = BinaryWeight(torch.ones(1, *shape, dtype=torch.int8), scale)
    linear = PackedLinear.from_binary(binary, activation_bits=bits, dtype=torch.float32)
    linear.signs.random_(0, 256, generator=generator)
    return linear


def random_transform(
    n1: int, n2: int, generator: torch.Generator, *, right: Literal["fitted", "hadamard", "none"] = "fitted"
) -> OnlineTransform:
    """Return a transform of n1 * n2 channels with a diagonal and random orthogonal factors.

    right: of any entries as after a fit, signs before a Hadamard matrix, or folded into what comes before.
    """
    left = torch.linalg.qr(torch.randn(n1, n1, generator=generator)).Q
    other = None
    if right == "fitted":
        other = torch.linalg.qr(torch.randn(n2, n2, generator=generator)).Q
    elif right == "hadamard":
        other = random_signs(n2, generator=generator) / n2**0.5
    return OnlineTransform.from_factors(torch.ones(n1 * n2), left, other, kind="kronecker")

"""Linears of random signs and row scales, as kernels are timed with."""

import torch

from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.runtime.modules import PackedLinear


def random_linear(shape: tuple[int, int], bits: int) -> PackedLinear:
    """Return a linear [out, in] of random signs and row scales that rounds to `bits`, always the same."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(1, shape[0], 1, generator=generator) + 0.5
    binary = BinaryWeight(torch.ones(1, *shape, dtype=torch.int8), scale)
    linear = PackedLinear.from_binary(binary, activation_bits=bits, dtype=torch.float32)
    linear.signs.random_(0, 256, generator=generator)
    return linear

"""Buffers of float16 values that no cast of a model's dtype can touch: int16 bits and an int8 power of two.

`name` int16 holds the bits, `name_exponent` int8 [] the exponent; both are saved. See numerics.half.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bwla_compiler.numerics.half import to_half_bits
from bwla_compiler.numerics.kronecker import signed_hadamard
from bwla_compiler.runtime.derived import Derived

DECODED: Derived[Tensor] = Derived("decoded scales")
WHOLE: Derived[Tensor] = Derived("whole Hadamard factors")

SMALLEST_EXPONENT = -120
"""Below, 2^e times a float16 leaves the normal float32 numbers: such a tensor counts as zeros."""


def register_half(module: nn.Module, name: str, values: Tensor | None) -> None:
    """Add the buffers `name` and `name_exponent` that hold `values` (any float), or None for both.

    Raises WeightError for NaN or infinity.
    """
    if values is None:
        _register(module, name, None, None)
        return
    bits, exponent = to_half_bits(values.detach())
    if exponent < SMALLEST_EXPONENT:
        bits, exponent = torch.zeros_like(bits), 0
    _register(module, name, bits, torch.tensor(exponent, dtype=torch.int8, device=bits.device))


def register_empty_half(
    module: nn.Module, name: str, shape: Sequence[int] | None, *, device: torch.device | str | None
) -> None:
    """Add zeroed buffers `name` of this shape and `name_exponent`, to be loaded; None for both where shape is None."""
    if shape is None:
        _register(module, name, None, None)
        return
    bits = torch.zeros(*shape, dtype=torch.int16, device=device)
    _register(module, name, bits, torch.zeros((), dtype=torch.int8, device=device))


def _register(module: nn.Module, name: str, bits: Tensor | None, exponent: Tensor | None) -> None:
    module.register_buffer(name, bits)
    module.register_buffer(f"{name}_exponent", exponent)


def read_half(module: nn.Module, name: str) -> Tensor | None:
    """Return the float32 values of buffer `name`, None where it is None."""
    bits, exponent = getattr(module, name), getattr(module, f"{name}_exponent")
    return None if bits is None else decoded(bits, exponent)


def decoded(bits: Tensor, exponent: Tensor) -> Tensor:
    """Return float16(bits) * 2^exponent as float32; bits int16, exponent int8 of one element.

    Eagerly the same tensor as long as the two are unchanged, so that what is derived from it is kept too;
    in a compiled graph the decoding is part of the graph.
    """
    if torch.compiler.is_dynamo_compiling() or bits.is_meta or type(bits) is not Tensor:
        return _decode(bits, exponent)
    return DECODED.get(bits, lambda: _decode(bits, exponent), beside=exponent)


def _decode(bits: Tensor, exponent: Tensor) -> Tensor:
    """Return float16(bits) * 2^exponent as float32; the power is put together from its bits, hence exact."""
    power = ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
    return bits.view(torch.float16).float() * power


def whole_factor(factor: Tensor) -> Tensor:
    """Return a right factor as a matrix [n2, n2]; of one that is stored as a diagonal [n2], the same while it lives."""
    return WHOLE.get(factor, lambda: signed_hadamard(factor)) if factor.dim() == 1 else factor

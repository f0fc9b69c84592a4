"""Roofline of one group of linears (Williams et al., 2009): seconds = Max(bytes / bandwidth, operations / peak).

Symbolic in sympy, so that a report can print and differentiate what it claims. Modelled, never measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import sympy as sp

from bwla_compiler.cost.devices import Device
from bwla_compiler.spec import FLOAT_BITS, LinearSpec

n_in, n_out, M, planes, rank, n1, n2, bits, scales, diagonal, bias = SYMBOLS = sp.symbols(
    "n_in n_out M planes rank n1 n2 bits scales diagonal bias", nonnegative=True
)
"""Sizes of a group: M tokens; n1, n2 are 0 for a factor that is absent; scales 16-bit scales a row and plane;
diagonal, bias 1 where present."""
bandwidth, int8_peak, float_peak = PEAKS = sp.symbols("bandwidth int8_peak float_peak", positive=True)


@dataclass(frozen=True)
class SymbolicCost:
    """sympy expressions of SYMBOLS (and PEAKS for seconds): bytes, int8 operations, float operations, seconds."""

    bytes: sp.Expr
    int8_ops: sp.Expr
    float_ops: sp.Expr
    seconds: sp.Expr


@dataclass(frozen=True)
class RegionCost:
    """The modelled cost of one group: bytes moved, operations (two a multiply-add), seconds, and what bounds them."""

    bytes: float
    ops: float
    seconds: float
    bound: Literal["memory", "compute"]


def symbolic_cost() -> SymbolicCost:
    """Return the cost of one group as expressions.

    Bytes: packed weights, 16-bit scales, factors and bias, int8 low-rank pair; 16-bit input and output; the rounded
    codes, an int8 container written and read once, where activations are rounded. Operations: each plane is a
    matrix product in int8 (float where activations are not rounded); the transform is float. A seeded Hadamard is
    costed like a Kronecker factor, as it is applied by the same kernel.
    """
    rounded = sp.Piecewise((1, bits < FLOAT_BITS), (0, True))
    weights = planes * n_out * (n_in / 8 + 2 * scales) + rank * (n_in + n_out + 2)
    extras = 2 * (n1**2 + n2**2) + 2 * diagonal * n_in + 2 * bias * n_out
    activations = M * (2 * n_in + 2 * n_out + 2 * n_in * rounded)
    products = 2 * M * (planes * n_in * n_out + rank * (n_in + n_out))
    transform = M * n_in * (2 * n1 + 2 * n2 + diagonal)
    n_bytes = weights + extras + activations
    int8_ops = products * rounded
    float_ops = transform + products * (1 - rounded)
    seconds = sp.Max(n_bytes / bandwidth, int8_ops / int8_peak + float_ops / float_peak)
    return SymbolicCost(n_bytes, int8_ops, float_ops, seconds)


def region_cost(spec: LinearSpec, *, tokens: int, device: Device) -> RegionCost:
    """Return the modelled cost of a group on a batch of `tokens` tokens."""
    n_bytes, int8_ops, float_ops, seconds = _compiled()(
        *_sizes(spec, tokens), device.bytes_per_second, device.int8_ops_per_second, device.bf16_flops
    )
    bound: Literal["memory", "compute"] = "memory" if n_bytes / device.bytes_per_second >= seconds else "compute"
    return RegionCost(float(n_bytes), float(int8_ops + float_ops), float(seconds), bound)


def _sizes(spec: LinearSpec, tokens: int) -> tuple[int, ...]:
    """Return the values of SYMBOLS for a spec."""
    transform = spec.transform
    columns = spec.in_features
    per_row = -(-columns // spec.group_size) if spec.scale_kind == "group" else 1
    return (
        columns,
        sum(spec.out_features),
        tokens,
        spec.planes,
        spec.rank,
        transform.n1 if transform.left else 0,
        transform.n2 if transform.right else 0,
        spec.activation_bits,
        per_row,
        int(transform.scaled) + int(spec.scale_kind == "row+column"),
        int(spec.bias),
    )


@cache
def _compiled() -> Callable[..., Any]:
    cost = symbolic_cost()
    compiled: Callable[..., Any] = sp.lambdify(
        (*SYMBOLS, *PEAKS), (cost.bytes, cost.int8_ops, cost.float_ops, cost.seconds), modules="math"
    )
    return compiled

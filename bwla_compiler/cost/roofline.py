"""Roofline of one group of linears (Williams et al., 2009), symbolic: bytes, operations, seconds, and where they cross.

A group runs in two stages, one after the other: the prologue (change of basis and rounding of the shared input) and
the product. Each takes Max(bytes / bandwidth, operations / peak). Modelled, never measured: launches, caches and
everything else that a real kernel loses are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import sympy as sp

from bwla_compiler.cost.devices import Device
from bwla_compiler.spec import FLOAT_BITS, LinearSpec

M = sp.Symbol("M", positive=True)
"""Tokens of a step."""

n_in, n_out, members, planes, rank, n1, n2, signed, diagonal, scales, columns, bias, rounded, experts, used = (
    SYMBOLS
) = sp.symbols(
    "n_in n_out members planes rank n1 n2 signed diagonal scales columns bias rounded experts used",
    integer=True,
    nonnegative=True,
)
"""Sizes of a group: n_out over all members; rank of each member; n1, n2 are 0 for a factor that is absent; signed: the
size of a right factor that is stored as signs before a Hadamard matrix, n2 then being 0; scales a row and plane; bias
in bytes an output; diagonal (before the transform), columns (scales of columns), rounded 1 or 0. experts: how many
matrices each member has, and how many of them a token takes; both 1 for a plain linear. Each of a token's rows counts
as a row of its own, also where experts share it."""

bandwidth, int8_peak, float_peak, units = PEAKS = sp.symbols("bandwidth int8_peak float_peak units", positive=True)

FLOAT_BYTES = 2
"""Of an activation that is not rounded: 16 bit."""

Bound = Literal["memory", "compute"]


@dataclass(frozen=True)
class Stage:
    """Expressions of M and SYMBOLS: bytes that are stored, bytes that a step moves, operations on int8 and floats."""

    stored: sp.Expr
    moved: sp.Expr
    int8_ops: sp.Expr
    float_ops: sp.Expr


@dataclass(frozen=True)
class SymbolicCost:
    """The two stages of a group."""

    prologue: Stage
    product: Stage

    @property
    def stored(self) -> sp.Expr:
        """Bytes of the packed modules' buffers."""
        return sp.expand(self.prologue.stored + self.product.stored)


@dataclass(frozen=True)
class RegionCost:
    """Modelled figures of one group on one device.

    stored: bytes of its packed modules. bytes: moved by a step. ops: two a multiply-add. seconds: of a step.
    prologue_seconds: of these, the prologue's. crossover: tokens a step from which the product's operations take
    longer than its bytes, None where they never do; bound: which of the two takes longer now.
    """

    stored: int
    bytes: int
    ops: int
    seconds: float
    prologue_seconds: float
    bound: Bound
    crossover: float | None


@cache
def symbolic_cost() -> SymbolicCost:
    """Return the cost of one group as expressions.

    Stored: what runtime.modules saves, byte for byte: signs in whole bytes a row, float16 scales, factors and
    diagonals, each tensor of them with one byte of exponent, the int8 low-rank pair, the bias. A step moves all of it
    once, the 16-bit input and output, and the prologue's result: int8 codes where activations are rounded, else
    16 bit. Each plane is a product in int8 (in floats where activations are not rounded); the prologue is float. A
    seeded Hadamard costs what a fitted factor does: it is stored and applied in the same way. One that is stored as
    signs is applied by additions, as CPU kernels do; those of GPUs multiply by it.
    """
    rows = M * used
    present = sp.Piecewise((1, n1 + n2 + signed + diagonal + rounded > 0), (0, True))
    stored = diagonal * (2 * n_in + 1) + _factor(n1) + _factor(n2) + 2 * signed + sp.Min(1, signed)
    additions = sp.log(sp.Max(1, signed), 2) + sp.Min(1, signed)
    width = FLOAT_BYTES - rounded  # bytes of what the product reads
    prologue = Stage(
        stored=stored,
        moved=stored + rows * n_in * (FLOAT_BYTES + width) * present,
        int8_ops=sp.Integer(0),
        float_ops=rows * n_in * (2 * n1 + 2 * n2 + additions + diagonal),
    )
    return SymbolicCost(prologue, _product(read=sp.Min(1, rows / experts)))


def _product(*, read: sp.Expr) -> Stage:
    """Return the stage of the products. read: the share of the experts' weights that a step reads."""
    rows = M * used
    width = FLOAT_BYTES - rounded
    signs = planes * n_out * sp.ceiling(n_in / 8)
    pair = rank * (members * n_in + n_out + 2 * members)
    one = signs + 2 * planes * n_out * scales + 2 * members * columns * n_in + pair + bias * n_out
    exponents = members * (1 + columns + sp.Min(1, rank))  # one a tensor, whatever the number of experts
    weights = experts * one + exponents
    ops = 2 * rows * (planes * n_in * n_out + rank * (members * n_in + n_out))
    return Stage(
        stored=weights,
        moved=weights * read + rows * (n_in * width + FLOAT_BYTES * n_out),
        int8_ops=ops * rounded,
        float_ops=ops * (1 - rounded),
    )


def _factor(side: sp.Symbol) -> sp.Expr:
    """Bytes of a Kronecker factor: float16 and its exponent; 0 for side 0."""
    return 2 * side**2 + sp.Min(1, side)


def memory_seconds(stage: Stage) -> sp.Expr:
    """Return the seconds that a stage's bytes take."""
    return stage.moved / bandwidth


def compute_seconds(stage: Stage, *, rows: sp.Expr | None = None) -> sp.Expr:
    """Return the seconds that a stage's operations take.

    rows: given where the work on a row runs on one of the device's units, as the fused prologue does (one program a
    row), so that fewer rows than units leave some idle.
    """
    seconds = stage.int8_ops / int8_peak + stage.float_ops / float_peak
    return seconds if rows is None else seconds * units / sp.Min(rows, units)


@cache
def symbolic_seconds() -> tuple[sp.Expr, sp.Expr]:
    """Return the seconds of prologue and product, expressions of M, SYMBOLS and PEAKS."""
    cost = symbolic_cost()
    return (
        sp.Max(memory_seconds(cost.prologue), compute_seconds(cost.prologue, rows=M * used)),
        sp.Max(memory_seconds(cost.product), compute_seconds(cost.product)),
    )


@cache
def symbolic_crossover() -> sp.Expr:
    """Return the M at which the product's operations take as long as its bytes; not positive where they never do.

    Both grow linearly: a + b M bytes against c M operations, so that M = a / (c bandwidth / peak - b). Of experts all
    are read at such M.
    """
    product = _product(read=sp.Integer(1))
    difference = memory_seconds(product) - compute_seconds(product)
    fixed, slope = difference.subs(M, 0), sp.diff(difference, M)
    return -fixed / slope


def region_cost(
    spec: LinearSpec, *, tokens: int, device: Device, bias_bytes: int = 4, n_experts: int = 1, n_used: int = 1
) -> RegionCost:
    """Return the modelled cost of a group for a step of `tokens` tokens.

    bias_bytes: of one entry of a bias. n_experts, n_used: matrices of each member, and those that a token takes.
    """
    values = (*sizes(spec, bias_bytes=bias_bytes, n_experts=n_experts, n_used=n_used), *peaks(device))
    stored, moved, ops, prologue, product, crossover = _compiled()(tokens, *values)
    return RegionCost(
        stored=int(stored),
        bytes=int(moved),
        ops=int(ops),
        seconds=float(prologue + product),
        prologue_seconds=float(prologue),
        bound="compute" if 0 < crossover < tokens else "memory",
        crossover=float(crossover) if crossover > 0 else None,
    )


def sizes(spec: LinearSpec, *, bias_bytes: int = 4, n_experts: int = 1, n_used: int = 1) -> tuple[int, ...]:
    """Return the values of SYMBOLS for a spec."""
    transform = spec.transform
    per_row = -(-spec.in_features // spec.group_size) if spec.scale_kind == "group" else 1
    return (
        spec.in_features,
        sum(spec.out_features),
        len(spec.out_features),
        spec.planes,
        spec.rank,
        transform.n1 if transform.left else 0,
        transform.n2 if transform.right and not transform.signed else 0,
        transform.n2 if transform.right and transform.signed else 0,
        int(transform.scaled),
        per_row,
        int(spec.scale_kind == "row+column"),
        bias_bytes * spec.bias,
        int(spec.activation_bits < FLOAT_BITS),
        n_experts,
        n_used,
    )


def peaks(device: Device) -> tuple[float, ...]:
    """Return the values of PEAKS for a device."""
    return device.bytes_per_second, device.int8_ops_per_second, device.bf16_flops, device.units


@cache
def _compiled() -> Callable[..., Any]:
    cost = symbolic_cost()
    moved = cost.prologue.moved + cost.product.moved
    ops = sum(stage.int8_ops + stage.float_ops for stage in (cost.prologue, cost.product))
    wanted = (cost.stored, moved, ops, *symbolic_seconds(), symbolic_crossover())
    compiled: Callable[..., Any] = sp.lambdify((M, *SYMBOLS, *PEAKS), wanted, modules="math", cse=True)
    return compiled

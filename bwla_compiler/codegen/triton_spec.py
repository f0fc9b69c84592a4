"""What the Triton emitters are told of a kernel: shapes, formats and tiles, as plain numbers; and what they give."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bwla_compiler.cost.factors import LARGEST_TILE, power_of_two
from bwla_compiler.spec import FLOAT_BITS, TransformSpec

GROUP = 128
"""Channels of one word of weights a row (4 x 32 bits), and columns that share one scale in weights with groups."""

Kind = Literal[
    "none", "rms_norm", "layer_norm", "silu_mul", "gelu_mul", "gelu_tanh_mul", "silu", "gelu", "gelu_tanh", "relu"
]
"""What happens to a linear's input before its change of basis."""

Precision = Literal["ieee", "tf32x2", "tf32x3"]
"""How float products run: in float32; on tf32 matrix units (11 significant bits) as two products, x in two parts of
22 bits together and the other operand exact in tf32 (signs, int8, float16 factors); or as three, both in two parts."""

GEMV_TOKENS = 1
"""Up to so many tokens the decode kernel serves; from there on each weight is used often enough for matrix units."""

LARGEST_FACTORED = 8192
"""Channels, sides padded to powers of two, up to which one program turns a token without spilling registers."""

BLOCK = 16
"""Rows (or columns) of a token's matrix that one program turns where a token is shared between programs."""

LARGEST_MIXED = 65536
"""Entries of a low-rank pair's inner matrix that a program beside the rounding of a token holds: more of them spill."""


def mixed_rows(columns: int, tokens: int, *, turned: bool) -> int:
    """Return the low-rank components of a program beside the rounding of a token; 0 where `low_rank` computes them.

    Such a program rounds the token for itself, which is free while units idle: of one token two components, so that
    many units read the matrix at once; of up to 8 tokens eight, so that all programs still run together. turned:
    whether it has factors; the registers that they take leave room for four.
    """
    rows = 2 if tokens == 1 else 4 if turned else 8
    return rows if tokens <= 8 and rows * power_of_two(columns) <= LARGEST_MIXED else 0


def padded(columns: int) -> int:
    """Return the columns of a row of codes: whole groups, the rest zeros."""
    return -(-columns // GROUP) * GROUP


NO_TRANSFORM = TransformSpec()


@dataclass(frozen=True)
class PrologueKernel:
    """One program a token: prologue, change of basis, column scale, rounding.

    columns: n. transform: its factors, and whether a diagonal comes first. column_scaled, gain, shift: which
    vectors [n] there are. activation_bits: 2 to 8 gives int8 codes, 16 floats. stride: columns of a row of the
    result, n or more; the rest is zeros. precision: of the factors' products. block: rows or columns, of the side
    that is not turned, that a program computes, 0 for all; needs one factor and a result of floats. ranks: of the
    low-rank pairs whose inner products with the codes programs beside it compute, mixed_rows components each.
    """

    columns: int
    kind: Kind = "none"
    transform: TransformSpec = NO_TRANSFORM
    column_scaled: bool = False
    gain: bool = False
    shift: bool = False
    activation_bits: int = 8
    stride: int = 0
    precision: Precision = "tf32x2"
    block: int = 0
    ranks: tuple[int, ...] = ()
    mixed_rows: int = 0

    @property
    def gated(self) -> bool:
        """Whether a second input is multiplied."""
        return self.kind.endswith("_mul")

    @property
    def normed(self) -> bool:
        """Whether statistics of the whole token are needed first."""
        return self.kind.endswith("_norm")

    @property
    def rounds(self) -> bool:
        """Whether the result is codes; else floats."""
        return self.activation_bits < FLOAT_BITS

    @property
    def row_stride(self) -> int:
        """Columns of a row of the result."""
        return self.stride or padded(self.columns)

    @property
    def online(self) -> bool:
        """Whether there is a factor."""
        return self.transform.left or self.transform.right

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the tile of a program with factors, powers of two."""
        n1, n2 = power_of_two(self.transform.n1), power_of_two(self.transform.n2)
        if not self.block:
            return n1, n2
        return (self.block, n2) if self.transform.right else (n1, self.block)

    @property
    def fits(self) -> bool:
        """Whether one program holds a whole token; else `stages` of several programs serve it."""
        if not self.online:
            return power_of_two(self.columns) <= LARGEST_TILE
        return self.sides[0] * self.sides[1] <= LARGEST_FACTORED

    @property
    def blocks(self) -> int:
        """Programs that share a token."""
        if not self.block:
            return 1
        return -(-(self.transform.n1 if self.transform.right else self.transform.n2) // self.block)

    @property
    def programs(self) -> int:
        """Programs of a token, with those of low-rank components."""
        return self.blocks + (LinearKernel.first_tiles(self.ranks, self.mixed_rows)[-1] if self.ranks else 0)

    @property
    def stages(self) -> tuple["PrologueKernel", ...]:
        """The kernels that do the same in turn, each reading the last one's floats: one factor each, then rounding."""
        t, found = self.transform, list["PrologueKernel"]()
        plain = PrologueKernel(self.columns, activation_bits=FLOAT_BITS, stride=self.columns, precision=self.precision)
        for side in ("right", "left"):
            if getattr(t, side):
                only = replace(t, left=side == "left", right=side == "right", scaled=t.scaled and not found)
                first = plain if found else replace(plain, kind=self.kind, gain=self.gain, shift=self.shift)
                found.append(replace(first, transform=only, block=BLOCK))
        last = replace(plain, column_scaled=self.column_scaled, activation_bits=self.activation_bits)
        return (*found, replace(last, stride=self.stride, ranks=self.ranks, mixed_rows=self.mixed_rows))

    @property
    def warps(self) -> int:
        """Warps of a program: about 32 channels a thread."""
        size = self.sides[0] * self.sides[1] if self.online else power_of_two(self.columns)
        return min(16, max(4, size // 1024))


@dataclass(frozen=True)
class Tile:
    """The piece of a result that one program computes. rows: outputs; tokens; warps; stages: of the load pipeline.

    split: groups of channels that the decode kernel reads side by side. parts: programs that share the channels of a
    tile of the matrix kernel.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    split: int = 1
    parts: int = 1


NO_TILE = Tile(rows=0, tokens=0, warps=0, stages=0)
"""Of a kernel whose tile is still to be chosen."""


@dataclass(frozen=True)
class LinearKernel:
    """1-bit linears that share their codes. One entry a member: out_features, ranks, biases, residuals.

    columns: n. planes: binary planes. grouped: one scale per 128 columns, else one per row. ranks: of the low-rank
    pair, 0 for none. biases, residuals: which members add one. assembly: CUDA's dp4a; else the same in plain Triton.
    decodes: whether the device has that instruction, so that one token has a kernel of its own. mixed_before: whether
    the kernel that rounds the input computes the low-rank pairs' first half too, else `low_rank` does.
    Where the tile has parts, `linear_dot` leaves their sums, and `linear_sum` adds them up and does the rest.
    """

    columns: int
    out_features: tuple[int, ...]
    planes: int
    grouped: bool
    ranks: tuple[int, ...]
    biases: tuple[bool, ...]
    residuals: tuple[bool, ...]
    activation_bits: int
    tile: Tile
    precision: Precision = "tf32x2"
    assembly: bool = False
    decodes: bool = True
    mixed_before: bool = False

    @property
    def groups(self) -> int:
        """Groups of 128 channels, the last one padded."""
        return padded(self.columns) // GROUP

    @property
    def rounds(self) -> bool:
        """Whether the input is codes; else floats."""
        return self.activation_bits < FLOAT_BITS

    @property
    def ranked(self) -> bool:
        """Whether any member has a low-rank pair."""
        return any(self.ranks)

    @property
    def part_groups(self) -> int:
        """Groups of channels of one part."""
        return -(-self.groups // self.tile.parts)

    @property
    def unrolled(self) -> int:
        """Groups of one step of the matrix kernel's loop: several spare instructions where warps multiply alone."""
        parts, chunk = self.tile.parts, self.part_groups
        if self.tile.warps >= 4 or not self.rounds or parts * chunk != self.groups:
            return 1
        return next(n for n in (4, 5, 3, 2, 1) if chunk % n == 0)

    @property
    def stages(self) -> int:
        """Stages of the loop's pipeline: two steps of several groups of many tokens hold more than three of one, and
        the registers of three spill."""
        return 2 if self.unrolled > 1 and self.tile.tokens > 16 else self.tile.stages

    @property
    def sum_tile(self) -> Tile:
        """The tile of the kernel that adds up parts."""
        few = self.tile.tokens <= 16
        # twice as many rows spill, a few, on sm_80 under triton 3.6; half as many warps on sm_100 under triton 3.9
        return Tile(rows=64 if few else 32, tokens=self.tile.tokens, warps=4 if few else 8, stages=1)

    @property
    def rank_tile(self) -> Tile:
        """The tile of the kernel of low-rank components: 16 of them; of few tokens programs share the channels."""
        few = self.tile.tokens <= 16
        parts = min(16, max(1, self.groups // 8)) if few and not self.mixed_before else 1
        return Tile(rows=16, tokens=16 if few else min(64, self.tile.tokens), warps=2, stages=4, parts=parts)

    @staticmethod
    def first_tiles(sizes: Sequence[int], rows: int) -> list[int]:
        """Return the number of each member's first tile of `rows`, and after the last the number of tiles."""
        first = [0]
        for size in sizes:
            first.append(first[-1] + -(-size // rows))
        return first


@dataclass(frozen=True)
class Int8Kernel:
    """A linear of int8 weights and float inputs: a head. columns: n. tile: `split` channels of a row at a time."""

    columns: int
    out_features: int
    bias: bool
    tile: Tile
    precision: Precision = "tf32x2"


@dataclass(frozen=True)
class Int4Kernel:
    """A linear of 4-bit weights and float inputs: a head. group_size: columns of a scale. tile: `split` bytes of two
    columns at a time where it has one token, else a group."""

    columns: int
    out_features: int
    group_size: int
    bias: bool
    tile: Tile
    precision: Precision = "tf32x2"


@dataclass(frozen=True)
class Work:
    """What a program of a kernel does, to count instructions by. weights: of 1 bit, planes counted; tokens: of its
    tile; slabs: trips of its loops of float products."""

    weights: int
    tokens: int
    slabs: int = 1

    @property
    def products(self) -> int:
        """Integer multiply-adds."""
        return self.weights * self.tokens


@dataclass(frozen=True)
class Emitted:
    """A kernel's source. name: of the jit function; parameters: (name, Triton type) in order, the type of
    activations written "*x"; warps, stages: how it is launched; title: what it does, in a line; work: of 1-bit
    linears."""

    name: str
    title: str
    source: str
    parameters: tuple[tuple[str, str], ...]
    warps: int
    stages: int
    work: Work | None = None

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's options, for a launch and for compilation alike; sums may be fused, as its versions differ in."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

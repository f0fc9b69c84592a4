"""What the Triton emitters are told of a kernel: shapes, formats and tiles, as plain numbers; and what they give."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bwla_compiler.cost.factors import LARGEST_TILE, holds, power_of_two
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


def padded(columns: int) -> int:
    """Return the columns of a row of codes: whole groups, the rest zeros."""
    return -(-columns // GROUP) * GROUP


NO_TRANSFORM = TransformSpec()


@dataclass(frozen=True)
class PrologueKernel:
    """One program a token: prologue, change of basis, column scale, rounding.

    columns: n. transform: its factors, and whether a diagonal comes first. column_scaled, gain, shift: which
    vectors [n] there are. activation_bits: 2 to 8 gives int8 codes, 16 floats. stride: columns of a row of the
    result, n or more; the rest is zeros. precision: of the factors' products.
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
    def fits(self) -> bool:
        """Whether one program can hold a token and the smaller factor."""
        if not (self.transform.left or self.transform.right):
            return power_of_two(self.columns) <= LARGEST_TILE
        return holds(self.transform.n1, self.transform.n2, both=self.transform.left and self.transform.right)

    @property
    def warps(self) -> int:
        """Warps of a program: about 32 channels a thread."""
        sides = (self.transform.n1, self.transform.n2)
        online = self.transform.left or self.transform.right
        size = power_of_two(sides[0]) * power_of_two(sides[1]) if online else power_of_two(self.columns)
        return min(16, max(4, size // 1024))


@dataclass(frozen=True)
class Tile:
    """The piece of a result that one program computes. rows: outputs; tokens; warps; stages: of the load pipeline.

    split: groups of channels that the decode kernel reads side by side.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    split: int = 1


@dataclass(frozen=True)
class LinearKernel:
    """1-bit linears that share their codes. One entry a member: out_features, ranks, biases, residuals.

    columns: n. planes: binary planes. grouped: one scale per 128 columns, else one per row. ranks: of the low-rank
    pair, 0 for none. biases, residuals: which members add one. assembly: CUDA's dp4a; else the same in plain Triton.
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
    def rank_tile(self) -> Tile:
        """The tile of the kernel of low-rank components: 16 of them, so that many programs share the columns."""
        return Tile(rows=16, tokens=max(16, min(64, self.tile.tokens)), warps=2, stages=self.tile.stages)

    @staticmethod
    def first_tiles(sizes: Sequence[int], rows: int) -> list[int]:
        """Return the number of each member's first tile of `rows`, and after the last the number of tiles."""
        first = [0]
        for size in sizes:
            first.append(first[-1] + -(-size // rows))
        return first


@dataclass(frozen=True)
class Emitted:
    """A kernel's source. name: of the jit function; parameters: (name, Triton type) in order, the type of
    activations written "*x"; warps, stages: how it is launched; title: what it does, in a line."""

    name: str
    title: str
    source: str
    parameters: tuple[tuple[str, str], ...]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's options, for a launch and for compilation alike; sums may be fused, as its versions differ in."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def dot_tile(tokens: int, *, planes: int, grouped: bool, rounds: bool) -> Tile:
    """Return the tile of the matrix kernel for a number of tokens; small ones so that many programs share decoding."""
    if not rounds:
        return Tile(rows=64, tokens=16 if tokens <= 16 else 32, warps=4, stages=2)
    if tokens <= 16:
        return Tile(rows=64, tokens=16, warps=2, stages=4)
    if tokens <= 64:
        return Tile(rows=64, tokens=64, warps=4, stages=3)
    if planes > 1 or grouped:
        return Tile(rows=128, tokens=64, warps=8, stages=3)
    return Tile(rows=128, tokens=128, warps=8, stages=3)


def gemv_tile(columns: int) -> Tile:
    """Return the tile of the decode kernel: groups side by side that leave none idle where they can, 4 to a warp."""
    split = 16 if (padded(columns) // GROUP) % 16 == 0 else 8
    return Tile(rows=32, tokens=1, warps=split // 4, stages=2, split=split)

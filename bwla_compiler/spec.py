"""LinearSpec: all that packing, reference, emitters and the cost model know of a quantized linear.

A weight is a short sum of binary planes, W' = sum_p scale_p * B_p + U V with B in {-1, +1}, read by
activations that were first transformed, x' = (x * input_scale) (left (x) right), then rounded to
`activation_bits` per token.
"""

from dataclasses import dataclass
from typing import Literal

FLOAT_BITS = 16
"""Activation bits from which on activations are left as they are."""

PROLOGUES = (
    "none", "rms_norm", "layer_norm", "silu_mul", "gelu_mul", "gelu_tanh_mul", "silu", "gelu", "gelu_tanh", "relu",
)  # fmt: skip
"""What a fused group may compute before its transform; "_mul" multiplies by a second input, the gate."""


@dataclass(frozen=True)
class TransformSpec:
    """An online change of basis of n = n1 * n2 channels: X [n1, n2] -> left^T X right, after a diagonal scale.

    left, right: whether that factor is present (else it is the identity); scaled: whether a diagonal
    comes first. signed: the right factor is diag(v) H with v [n2] of equal sizes, which alone is stored, and H
    Sylvester's Hadamard matrix. kind "folded" and "none" have no factor: the input is already in its basis, or never
    leaves it.
    """

    kind: Literal["none", "folded", "kronecker", "hadamard"] = "none"
    n1: int = 1
    n2: int = 1
    left: bool = False
    right: bool = False
    scaled: bool = False
    signed: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers its factors take, the diagonal left out."""
        return self.left * self.n1**2 + self.right * (self.n2 if self.signed else self.n2**2)

    @property
    def online(self) -> bool:
        """Whether anything is computed at run time."""
        return self.left or self.right or self.scaled


@dataclass(frozen=True)
class Coding:
    """How an embedding or a head is stored: codes of 8 bits and a scale a row, or of 4 and one a group of its columns.

    group_size: columns of a group; 0 for the whole row, which 8 bits take.
    """

    bits: Literal[8, 4] = 8
    group_size: int = 0

    def code_bytes(self, width: int) -> int:
        """Return the bytes that the codes of a row of so many columns take."""
        return -(-width * self.bits // 8)

    def scales(self, width: int) -> int:
        """Return the scales of a row of so many columns."""
        return -(-width // self.group_size) if self.group_size else 1


INT8_ROWS = Coding()

CACHE_BITS = (8, FLOAT_BITS)
"""Bits that keys and values may be cached in."""

END_GROUPS = (32, 64, 128)
"""Columns that may share a scale of 4-bit codes."""


@dataclass(frozen=True)
class LinearSpec:
    """The shape and format of one group of linears that share an input.

    in_features: n. out_features: one size per member. planes: binary planes. scale_kind: one scale per
    row, per row and column, or per row and group of `group_size` columns. rank: of the int8 low-rank
    pair, 0 for none. activation_bits: 2..8 rounds to signed integers per token, 16 leaves floats.
    """

    in_features: int
    out_features: tuple[int, ...]
    planes: int = 1
    scale_kind: Literal["row", "row+column", "group"] = "row"
    group_size: int = 128
    rank: int = 0
    transform: TransformSpec = TransformSpec()
    activation_bits: int = 6
    bias: bool = False


ROUTINE_RESULTS = (1, 2, 3, 4, 5, 6)
"""Results for which there is an operator bwla::routine1, 2, ..: a fixed number is what Inductor's C++ wrapper knows.
The calls between two attentions give query, key, value and the stream, and seldom more."""

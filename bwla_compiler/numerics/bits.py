"""True bits: all that is stored for a weight, over the number of weights. Nothing is left out to look small."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from bwla_compiler.spec import LinearSpec

SCALE_BITS = 16
FACTOR_BITS = 8


@dataclass(frozen=True)
class Bits:
    """Stored size. linears: bits per weight of the quantized linears; model: of all weights; n_bytes: of the model."""

    linears: float
    model: float
    n_bytes: int


def claimed_bits(spec: LinearSpec) -> float:
    """Return bits per weight of a group by formula, to be held against the bytes that are really stored.

    Per plane a sign (1) and a scale (16 / in, or 16 / g in groups); column scale 16 / out; Kronecker factors
    16 (n1^2 + n2^2) and an online diagonal 16 in, each over the group's weights; a seeded Hadamard 0; the low-rank
    pair 8 r (in + out) + 16 r; a bias 16 / in.
    """
    n_in, n_out = spec.in_features, sum(spec.out_features)
    scales = -(-n_in // spec.group_size) if spec.scale_kind == "group" else 1
    bits = spec.planes * n_out * (n_in + SCALE_BITS * scales)
    bits += SCALE_BITS * n_in * (spec.scale_kind == "row+column")
    bits += transform_bits(spec)
    bits += spec.rank * (FACTOR_BITS * (n_in + n_out) + SCALE_BITS)
    bits += SCALE_BITS * n_out * spec.bias
    return bits / (n_in * n_out)


def transform_bits(spec: LinearSpec) -> int:
    """Return all bits of a group's online transform: what `claimed_bits` spreads over its weights."""
    transform = spec.transform
    diagonal = SCALE_BITS * spec.in_features * transform.scaled
    if transform.kind != "kronecker":
        return diagonal
    return diagonal + SCALE_BITS * transform.numbers


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of distinct tensors; one that is given twice (a tied weight) counts once."""
    distinct = {id(t): t for t in tensors}
    return sum(t.numel() * t.element_size() for t in distinct.values())

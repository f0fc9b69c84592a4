"""Binary planes: one bit per sign in the canonical order, and the weight they stand for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError, WeightError


def pack_signs(signs: Tensor) -> Tensor:
    """Return signs [..., n] int8 in {-1, +1} as bits [..., ceil(n / 8)] uint8; the canonical order of a checkpoint.

    Bit j (least significant first) of byte k is column 8k + j; 1 means +1; padding bits are 0.
    """
    n = signs.shape[-1]
    bits = (signs > 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -n % 8))
    packed = torch.zeros(*signs.shape[:-1], bits.shape[-1] // 8, dtype=torch.uint8, device=signs.device)
    for j in range(8):
        packed |= bits[..., j::8] << j
    return packed


def unpack_signs(packed: Tensor, n: int) -> Tensor:
    """Return the signs [..., n] int8 in {-1, +1} of packed [..., ceil(n / 8)] uint8.

    Raises ShapeError where the bytes do not hold n columns.
    """
    if packed.shape[-1] != (n + 7) // 8:
        raise ShapeError(f"{packed.shape[-1]} bytes a row do not hold {n} columns: {(n + 7) // 8} are needed")
    bits = torch.empty(*packed.shape, 8, dtype=torch.int8, device=packed.device)
    for j in range(8):
        bits[..., j] = ((packed >> j) & 1).to(torch.int8)
    return (bits.flatten(-2)[..., :n] * 2 - 1).contiguous()


@dataclass(frozen=True)
class BinaryWeight:
    """W = (sum_p scale_p * B_p) * column_scale + low_rank_out @ low_rank_in.

    signs [planes, out, in] int8 in {-1, +1}; scale [planes, out, groups] float32, group g holding columns
    g * group_size onwards; column_scale [in] float32 or None; low_rank_out [out, rank] and low_rank_in [rank, in] or
    both None. group_size: 0 stands for ceil(in / groups). Raises ShapeError for shapes that do not fit, WeightError
    for entries that are not finite, or signs other than +-1.
    """

    signs: Tensor
    scale: Tensor
    column_scale: Tensor | None = None
    low_rank_out: Tensor | None = None
    low_rank_in: Tensor | None = None
    group_size: int = 0

    def __post_init__(self) -> None:
        self._check_planes()
        self._check_low_rank()
        self._check_entries()

    @property
    def planes(self) -> int:
        """Number of binary planes."""
        return self.signs.shape[0]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.signs.shape[1]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.signs.shape[2]

    @property
    def rank(self) -> int:
        """Rank of the low-rank pair, 0 for none."""
        return 0 if self.low_rank_out is None else self.low_rank_out.shape[1]

    def columns_per_scale(self) -> int:
        """Return the columns that share one scale; the last group may have fewer."""
        return self.group_size or -(-self.in_features // max(1, self.scale.shape[2]))

    def dense(self) -> Tensor:
        """Return the weight [out, in] float32."""
        scale = self.scale.float().repeat_interleave(self.columns_per_scale(), dim=2)[..., : self.in_features]
        weight = (scale * self.signs).sum(0)
        if self.column_scale is not None:
            weight = weight * self.column_scale.float()
        if self.low_rank_out is not None and self.low_rank_in is not None:
            weight = weight + self.low_rank_out.float() @ self.low_rank_in.float()
        return weight

    def _check_planes(self) -> None:
        if self.signs.dim() != 3 or self.scale.dim() != 3 or self.signs.shape[:2] != self.scale.shape[:2]:
            raise ShapeError(
                f"signs {list(self.signs.shape)} and scale {list(self.scale.shape)}: "
                "expected [planes, out, in] and [planes, out, groups]"
            )
        groups = -(-self.in_features // max(1, self.columns_per_scale()))
        if groups != self.scale.shape[2]:
            raise ShapeError(
                f"{self.scale.shape[2]} scales a row do not cover {self.in_features} columns "
                f"in groups of {self.columns_per_scale()}: {groups} are needed"
            )
        if self.column_scale is not None and self.column_scale.shape != (self.in_features,):
            raise ShapeError(f"column scale {list(self.column_scale.shape)}: expected [{self.in_features}]")

    def _check_low_rank(self) -> None:
        if self.low_rank_out is None and self.low_rank_in is None:
            return
        if self.low_rank_out is None or self.low_rank_in is None:
            raise ShapeError("a low-rank pair needs both of its factors")
        out, rank = self.out_features, self.low_rank_out.shape[-1]
        if self.low_rank_out.shape != (out, rank) or self.low_rank_in.shape != (rank, self.in_features):
            raise ShapeError(
                f"low-rank pair {list(self.low_rank_out.shape)} and {list(self.low_rank_in.shape)}: "
                f"expected [{out}, rank] and [rank, {self.in_features}]"
            )

    def _check_entries(self) -> None:
        if self.signs.is_meta:
            return
        if not (self.signs.abs() == 1).all():
            raise WeightError("signs must all be -1 or +1")
        for name in ("scale", "column_scale", "low_rank_out", "low_rank_in"):
            values: Tensor | None = getattr(self, name)
            if values is not None and not values.isfinite().all():
                raise WeightError(f"{name} holds NaN or infinity")


@dataclass(frozen=True)
class SimulatedWeight:
    """A weight that no packed format holds, as the floats dense_weight [out, in]; n_bits: all that it would take."""

    dense_weight: Tensor
    n_bits: int

    @property
    def rank(self) -> int:
        """Rank of the low-rank pair: there is none."""
        return 0

    def dense(self) -> Tensor:
        """Return the weight [out, in] float32."""
        return self.dense_weight.float()

"""Products of rows with the packed matrices of the experts that they are sent to: what bwla::experts computes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bwla_compiler.codegen.library import KernelLibrary, Member
from bwla_compiler.errors import ShapeError
from bwla_compiler.runtime import portable
from bwla_compiler.runtime.checks import check_linear
from bwla_compiler.runtime.compiled import Linear
from bwla_compiler.runtime.derived import Derived
from bwla_compiler.spec import FLOAT_BITS

PACKED_EXPERTS: Derived[Tensor] = Derived("kernel layout of experts")
PACKED_EXPERT_SCALES: Derived[Tensor] = Derived("kernel scales of experts")
PACKED_EXPERT_PAIRS: Derived[Tensor] = Derived("kernel pairs of experts")
CACHES = (PACKED_EXPERTS, PACKED_EXPERT_SCALES, PACKED_EXPERT_PAIRS)


@dataclass(frozen=True)
class Experts:
    """The packed matrices of E experts.

    signs uint8 [E, planes, out, ceil(in / 8)]; scale [E, planes, out, groups] float; column_scale [E, in] or None;
    low_rank (in int8 [E, rank, in], out int8 [E, out, rank], scale [E, rank]) or None; activation_bits 2..8 or 16.
    """

    signs: Tensor
    scale: Tensor
    column_scale: Tensor | None
    low_rank: tuple[Tensor, Tensor, Tensor] | None
    activation_bits: int

    def linear(self, expert: int) -> Linear:
        """Return one expert's linear, its tensors views of these."""
        into, onto, rank_scale = (t[expert] for t in self.low_rank) if self.low_rank else (None, None, None)
        pair = None if into is None or onto is None or rank_scale is None else (into, onto, rank_scale)
        return Linear(self.signs[expert], self.scale[expert], pair, None)


def check_experts(x: Tensor, experts: Tensor, packed: Experts) -> None:
    """Raise ShapeError where x [N, in], experts [N] or [N, k] and the packed tensors do not fit each other."""
    if x.dim() != 2 or experts.dim() not in (1, 2) or experts.shape[:1] != x.shape[:1]:
        raise ShapeError(f"x {list(x.shape)} and experts {list(experts.shape)}: expected [N, in] and [N] or [N, k]")
    if experts.is_floating_point() or experts.dtype == torch.bool:
        raise ShapeError(f"experts are {experts.dtype}: expected the integer numbers of experts")
    n_experts = packed.signs.shape[0]
    stacked = (packed.scale, packed.column_scale, *(packed.low_rank or ()))
    if packed.signs.dim() != 4 or any(t is not None and t.shape[:1] != (n_experts,) for t in stacked):
        shapes = [list(t.shape) for t in (packed.signs, *stacked) if t is not None]
        raise ShapeError(
            f"signs, scales and low-rank pair {shapes}: expected [E, planes, out, bytes], the others [E, ..]"
        )
    if packed.column_scale is not None and packed.column_scale.shape[1:] != x.shape[1:]:
        raise ShapeError(f"column_scale {list(packed.column_scale.shape)}: expected [{n_experts}, {x.shape[1]}]")
    if n_experts:
        check_linear(x, packed.linear(0), packed.activation_bits)


def expert_products(x: Tensor, experts: Tensor, packed: Experts, *, library: KernelLibrary | None) -> Tensor:
    """Return y [M, out] float32: row m is token m // (M / N) of x times expert experts[m]; zeros where it is none's.

    x [N, in] float32; experts [M] integers, M a multiple of N, those outside 0..E-1 none's. library: the compiled
    kernels, None for plain torch.
    """
    tokens, choices = x.shape[0], experts.shape[0] // max(1, x.shape[0])
    y = torch.zeros(tokens * choices, packed.signs.shape[2], dtype=torch.float32, device=x.device)
    product = _Portable(x, packed) if library is None else _Compiled(library, x, packed)
    for expert, rows in _by_expert(experts, packed.signs.shape[0]):
        y[rows] = product.rows(expert, rows // choices)
    return y


def _by_expert(experts: Tensor, n_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (expert, its rows in order) for every expert that has any."""
    order = torch.argsort(experts, stable=True)
    numbers = torch.arange(n_experts + 1, device=experts.device, dtype=experts.dtype)
    ends = torch.searchsorted(experts[order], numbers).tolist()
    for expert in range(n_experts):
        if ends[expert] < ends[expert + 1]:
            yield expert, order[ends[expert] : ends[expert + 1]]


class _Portable:
    """Products in plain torch; tokens are rounded once for all experts where no column scale sets them apart."""

    def __init__(self, x: Tensor, packed: Experts) -> None:
        self.x, self.packed = x, packed
        shared = packed.column_scale is None
        self.rounded = portable.rounded(x, None, packed.activation_bits) if shared else None

    def rows(self, expert: int, tokens: Tensor) -> Tensor:
        """Return the tokens' products with one expert's matrix [len(tokens), out]."""
        if self.rounded is not None:
            codes, scale = self.rounded
            q, token_scale = codes[tokens], None if scale is None else scale[tokens]
        else:
            assert self.packed.column_scale is not None
            q, token_scale = portable.rounded(
                self.x[tokens], self.packed.column_scale[expert], self.packed.activation_bits
            )
        linear = self.packed.linear(expert)
        return portable.linear(q, token_scale, linear.signs, linear.scale, linear.low_rank, None)


class _Compiled:
    """Products by compiled kernels, which round each row that they are given: the same codes every time."""

    def __init__(self, library: KernelLibrary, x: Tensor, packed: Experts) -> None:
        self.library, self.x, self.packed = library, x, packed
        self.signs = _packed_signs(library, packed.signs, x.shape[1])
        groups = packed.scale.shape[3]
        self.scale = _packed_scale(library, packed.scale) if groups > 1 else packed.scale.float().contiguous()
        self.column_scale = None if packed.column_scale is None else packed.column_scale.float().contiguous()
        into, onto, rank_scale = packed.low_rank or (None, None, None)
        self.into = None if into is None else into.contiguous()
        self.onto = None if onto is None else _packed_pairs(library, onto)
        self.rank_scale = None if rank_scale is None else rank_scale.float().contiguous()
        bits = packed.activation_bits
        self.limit = 0 if bits >= FLOAT_BITS else 2 ** (bits - 1) - 1

    def rows(self, expert: int, tokens: Tensor) -> Tensor:
        """Return the tokens' products with one expert's matrix [len(tokens), out]."""
        x = self.x[tokens].contiguous()
        _, planes, out, _ = self.packed.signs.shape
        y = torch.empty(x.shape[0], out, dtype=torch.float32)
        member = Member(
            signs=_address(self.signs, expert),
            scale=_address(self.scale, expert),
            rank_in=_address(self.into, expert),
            rank_out=_address(self.onto, expert),
            rank_scale=_address(self.rank_scale, expert),
            y=y.data_ptr(),
            out_features=out,
            planes=planes,
            groups=self.packed.scale.shape[3],
            rank=0 if self.into is None else self.into.shape[1],
        )
        self.library.linear(
            x.data_ptr(), _address(self.column_scale, expert), x.shape[0], x.shape[1], self.limit,
            member, 1, torch.get_num_threads(),
        )  # fmt: skip
        return y


def _address(tensor: Tensor | None, expert: int) -> int:
    """Return where one expert's part of a contiguous tensor begins, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr() + expert * tensor.stride(0) * tensor.element_size()


def _packed_signs(library: KernelLibrary, signs: Tensor, columns: int) -> Tensor:
    """Return the kernel's layout [E, bytes] of canonical signs, derived once a state of the tensor."""

    def pack() -> Tensor:
        n_experts, planes, out, _ = signs.shape
        packed = torch.empty(n_experts, library.packed_bytes(planes, out, columns), dtype=torch.uint8)
        source = signs.contiguous()
        for e in range(n_experts):
            library.pack(_address(source, e), _address(packed, e), planes, out, columns, torch.get_num_threads())
        return packed

    return PACKED_EXPERTS.get(signs, pack)


def _packed_scale(library: KernelLibrary, scale: Tensor) -> Tensor:
    """Return the kernel's layout [E, n] of group scales."""

    def pack() -> Tensor:
        n_experts, planes, out, groups = scale.shape
        packed = torch.empty(n_experts, library.packed_scales(planes, out, groups), dtype=torch.float32)
        source = scale.float().contiguous()
        for e in range(n_experts):
            library.pack_scale(_address(source, e), _address(packed, e), planes, out, groups)
        return packed

    return PACKED_EXPERT_SCALES.get(scale, pack)


def _packed_pairs(library: KernelLibrary, codes: Tensor) -> Tensor:
    """Return the kernel's layout [E, n] of the outer halves of low-rank pairs, codes int8 [E, out, rank]."""

    def pack() -> Tensor:
        n_experts, out, rank = codes.shape
        packed = torch.empty(n_experts, library.packed_pair(out, rank), dtype=torch.int8)
        source = codes.contiguous()
        for e in range(n_experts):
            library.pack_pair(_address(source, e), _address(packed, e), out, rank)
        return packed

    return PACKED_EXPERT_PAIRS.get(codes, pack)

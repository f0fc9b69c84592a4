"""Operators on the CPU through compiled kernels; None of them where there is no compiler."""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bwla_compiler.codegen.library import KernelLibrary, Member, best_library
from bwla_compiler.runtime.derived import Derived
from bwla_compiler.spec import FLOAT_BITS

PACKED_SIGNS: Derived[Tensor] = Derived("kernel layout")
PACKED_SCALES: Derived[Tensor] = Derived("kernel scales")
PACKED_PAIRS: Derived[Tensor] = Derived("kernel pairs")
CACHES = (PACKED_SIGNS, PACKED_SCALES, PACKED_PAIRS)


@functools.cache
def kernels() -> KernelLibrary | None:
    """Return this machine's kernels, built at the first call; None, with one warning, where there is no compiler.

    Raises BuildError where the compiler rejects them.
    """
    library = best_library()
    if library is None:
        warnings.warn(
            "no C++ compiler was found, so quantized linears run in plain torch, many times slower; "
            "install g++ or name a compiler in BWLA_CXX",
            RuntimeWarning,
            stacklevel=2,
        )
    return library


@dataclass(frozen=True)
class Linear:
    """The tensors of one linear as the operators take them; see `ops`."""

    signs: Tensor
    scale: Tensor
    low_rank: tuple[Tensor, Tensor, Tensor] | None
    bias: Tensor | None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _plain(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the tensor contiguous and of `dtype`; itself where it is already."""
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def _packed_signs(library: KernelLibrary, signs: Tensor, columns: int) -> Tensor:
    """Return the kernel's layout of canonical signs, derived once a state of the tensor."""

    def pack() -> Tensor:
        planes, out, _ = signs.shape
        packed = torch.empty(library.packed_bytes(planes, out, columns), dtype=torch.uint8)
        source = signs.contiguous()
        library.pack(source.data_ptr(), packed.data_ptr(), planes, out, columns, torch.get_num_threads())
        return packed

    return PACKED_SIGNS.get(signs, pack)


def _packed_scale(library: KernelLibrary, scale: Tensor) -> Tensor:
    """Return the kernel's layout of group scales; row scales need none."""

    def pack() -> Tensor:
        packed = torch.empty(library.packed_scales(*scale.shape), dtype=torch.float32)
        source = scale.float().contiguous()
        planes, out, groups = scale.shape
        library.pack_scale(source.data_ptr(), packed.data_ptr(), planes, out, groups)
        return packed

    return PACKED_SCALES.get(scale, pack)


def _packed_pair(library: KernelLibrary, codes: Tensor) -> Tensor:
    """Return the kernel's layout of the outer half of a low-rank pair, codes int8 [out, rank]."""

    def pack() -> Tensor:
        packed = torch.empty(library.packed_pair(*codes.shape), dtype=torch.int8)
        source = codes.contiguous()
        library.pack_pair(source.data_ptr(), packed.data_ptr(), *codes.shape)
        return packed

    return PACKED_PAIRS.get(codes, pack)


def linears(
    library: KernelLibrary, x: Tensor, linears: Sequence[Linear], column_scale: Tensor | None, bits: int
) -> list[Tensor]:
    """Return one y [tokens, out] float32 per linear, for x [tokens, in] that they share; x is rounded once."""
    x = x.float().contiguous()
    tokens, columns = x.shape
    column_scale = _plain(column_scale, torch.float32)
    results: list[Tensor] = []
    kept: list[Tensor | None] = []  # the addresses below are valid while these live
    members = (Member * len(linears))()
    for member, linear in zip(members, linears, strict=True):
        planes, out, _ = linear.signs.shape
        groups = linear.scale.shape[2]
        y = torch.empty(tokens, out, dtype=torch.float32)
        signs = _packed_signs(library, linear.signs, columns)
        scale = _packed_scale(library, linear.scale) if groups > 1 else _plain(linear.scale, torch.float32)
        bias = _plain(linear.bias, torch.float32)
        member.signs, member.scale = signs.data_ptr(), _address(scale)
        member.bias, member.y = _address(bias), y.data_ptr()
        member.out_features, member.planes, member.groups = out, planes, groups
        kept += [signs, scale, bias]
        if linear.low_rank is not None:
            into, onto = linear.low_rank[0].contiguous(), _packed_pair(library, linear.low_rank[1])
            rank_scale = _plain(linear.low_rank[2], torch.float32)
            member.rank_in, member.rank_out = into.data_ptr(), onto.data_ptr()
            member.rank_scale, member.rank = _address(rank_scale), into.shape[0]
            kept += [into, onto, rank_scale]
        results.append(y)
    limit = 0 if bits >= FLOAT_BITS else 2 ** (bits - 1) - 1
    library.linear(
        x.data_ptr(), _address(column_scale), tokens, columns, limit,
        members, len(linears), torch.get_num_threads(),
    )  # fmt: skip
    return results


def int8_linear(library: KernelLibrary, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return (x codes^T) * scale + bias [tokens, out] float32; x [tokens, in], codes int8 [out, in], scale [out]."""
    x, codes = x.float().contiguous(), codes.contiguous()
    row_scale, plain_bias = _plain(scale, torch.float32), _plain(bias, torch.float32)
    y = torch.empty(x.shape[0], codes.shape[0], dtype=torch.float32)
    library.int8_linear(
        x.data_ptr(), codes.data_ptr(), _address(row_scale), _address(plain_bias), y.data_ptr(),
        x.shape[0], codes.shape[0], codes.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return y


def int4_linear(
    library: KernelLibrary, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, *, group_size: int, power: int
) -> Tensor:
    """Return x W^T + bias [tokens, out] float32 for x [tokens, in], W = 2^power * scale * codes.

    codes uint8 [out, ceil(in / 2)]; scale [out, groups] int16 bits of float16.
    """
    x, codes, scale, plain_bias = (
        x.float().contiguous(),
        codes.contiguous(),
        scale.contiguous(),
        _plain(bias, torch.float32),
    )
    y = torch.empty(x.shape[0], codes.shape[0], dtype=torch.float32)
    library.int4_linear(
        x.data_ptr(), codes.data_ptr(), scale.data_ptr(), _address(plain_bias), y.data_ptr(),
        x.shape[0], codes.shape[0], x.shape[1], group_size, power, torch.get_num_threads(),
    )  # fmt: skip
    return y

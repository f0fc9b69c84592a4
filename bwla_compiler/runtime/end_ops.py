"""Implementations of bwla's operators on embeddings and heads, for `ops`: codes of 8 or of 4 bits times scales."""

from typing import Any

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError
from bwla_compiler.runtime import compiled, native, on_triton, portable
from bwla_compiler.runtime.checks import values
from bwla_compiler.runtime.rows import empty_result, rows_of, shaped_like
from bwla_compiler.spec import END_GROUPS


def int8_linear_with(fast: bool) -> Any:
    """Return the implementation of bwla::int8_linear."""

    def int8_linear(
        x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, scale_exponent: Tensor | None = None
    ) -> Tensor:
        if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] != x.shape[-1]:
            raise ShapeError(f"codes {codes.dtype} {list(codes.shape)}: expected int8 [out, {x.shape[-1]}]")
        if scale.shape != codes.shape[:1]:
            raise ShapeError(f"scale {list(scale.shape)}: expected [{codes.shape[0]}]")
        scale, rows = values(scale, scale_exponent), rows_of(x)
        if on_triton.serves(rows):
            return shaped_like(on_triton.int8_linear(rows, codes, scale, bias), x)
        library = compiled.kernels() if fast and native.wanted() else None
        if library is not None and rows.shape[0] <= native.END_TOKENS[library.isa].int8:
            y = compiled.int8_linear(library, rows, codes, scale, bias)
        else:
            y = portable.int8_linear(rows, codes, scale, bias)
        return shaped_like(y, x)

    return int8_linear


def int4_linear_with(fast: bool) -> Any:
    """Return the implementation of bwla::int4_linear."""

    def int4_linear(
        x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, group_size: int,
        scale_exponent: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        _check_nibbles(codes, scale, x.shape[-1], group_size)
        decoded, rows = values(scale, scale_exponent), rows_of(x)
        if on_triton.serves(rows):
            return shaped_like(on_triton.int4_linear(rows, codes, decoded, bias, group_size), x)
        library = compiled.kernels() if fast and native.wanted() else None
        few = library is not None and rows.shape[0] <= native.END_TOKENS[library.isa].int4
        if library is not None and few and scale_exponent is not None:
            power = int(scale_exponent)
            y = compiled.int4_linear(library, rows, codes, scale, bias, group_size=group_size, power=power)
        else:
            y = portable.int4_linear(rows, codes, decoded, bias, group_size)
        return shaped_like(y, x)

    return int4_linear


def int8_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype, scale_exponent: Tensor | None = None
) -> Tensor:
    """Implementation of bwla::int8_embedding."""
    return portable.int8_embedding(ids, codes, values(scale, scale_exponent), dtype)


def int4_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, width: int, group_size: int, dtype: torch.dtype,
    scale_exponent: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Implementation of bwla::int4_embedding."""
    _check_nibbles(codes, scale, width, group_size)
    return portable.int4_embedding(ids, codes, values(scale, scale_exponent), width, group_size, dtype)


def _check_nibbles(codes: Tensor, scale: Tensor, width: int, group_size: int) -> None:
    """Raise ShapeError where packed 4-bit codes and their scales do not fit rows of `width` columns."""
    if group_size not in END_GROUPS:
        raise ShapeError(f"group_size is {group_size}: expected one of {', '.join(map(str, END_GROUPS))}")
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != -(-width // 2):
        raise ShapeError(f"codes {codes.dtype} {list(codes.shape)}: expected uint8 [out, {-(-width // 2)}]")
    if scale.shape != (codes.shape[0], -(-width // group_size)):
        raise ShapeError(f"scale {list(scale.shape)}: expected [{codes.shape[0]}, {-(-width // group_size)}]")


def fake_linear(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    """Return an empty result of bwla::int8_linear or int4_linear."""
    return empty_result(x, codes.shape[0])


def fake_int8_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype, scale_exponent: Tensor | None = None
) -> Tensor:
    """Return an empty result of bwla::int8_embedding."""
    return codes.new_empty([*ids.shape, codes.shape[1]], dtype=dtype)


def fake_int4_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, width: int, group_size: int, dtype: torch.dtype,
    scale_exponent: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return an empty result of bwla::int4_embedding."""
    return codes.new_empty([*ids.shape, width], dtype=dtype)

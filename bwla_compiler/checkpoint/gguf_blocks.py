"""Weights as the blocks of ggml types: signs as Q1_0, ends as Q8_0 or Q4_0; the values are those of our modules.

A block is a float16 scale d and the codes of consecutive columns. Q1_0, 128 columns, 18 bytes: bit j of byte k, the
least significant being j = 0, is column 8k + j; 1 is +d, 0 is -d. Q8_0, 32 columns, 34 bytes: int8 codes c, d * c.
Q4_0, 32 columns, 18 bytes: byte j holds c + 8 of column j in its low four bits, of column j + 16 in its high ones.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bwla_compiler.errors import CheckpointError

SIGN_COLUMNS, CODE_COLUMNS = 128, 32
"""Columns of a block."""

ROUNDING = 2.0**-11
"""What float16 may change of a scale, relative to the tensor's largest: below, scales count as the same."""

Blocks = npt.NDArray[np.uint8]
"""Blocks of each row, one behind the other: [rows, bytes of a row]."""


def sign_blocks(signs: Tensor, scale: Tensor, *, name: str) -> Blocks:
    """Return Q1_0 of signs uint8 [m, n / 8] in canonical order and scale [m, n / 128] or [m, 1] float32.

    name: of the weight, for errors. Raises CheckpointError where n is no multiple of 128, or a scale is none of
    float16.
    """
    rows, width = signs.shape
    if width % (SIGN_COLUMNS // 8):
        raise CheckpointError(
            f"{name}: has {8 * width} inputs, and GGUF's Q1_0 takes multiples of {SIGN_COLUMNS}; use --to dense"
        )
    groups = width * 8 // SIGN_COLUMNS
    return _blocks(_halves(scale, name=name).expand(rows, groups), signs.reshape(rows, groups, -1))


def code_blocks(codes: Tensor, scale: Tensor, *, name: str) -> Blocks:
    """Return Q8_0 of codes int8 [m, n] and scale [m] float32; raises CheckpointError as sign_blocks does."""
    blocks = _code_columns(codes, "Q8_0", name=name)
    return _blocks(_halves(scale[:, None], name=name).expand(blocks.shape[:2]), blocks)


def nibble_blocks(codes: Tensor, scale: Tensor, *, group_size: int, name: str) -> Blocks:
    """Return Q4_0 of codes int8 [m, n] in -8 to 7 and scale [m, ceil(n / group_size)] float32, several blocks a scale.

    Raises CheckpointError as sign_blocks does.
    """
    blocks = _code_columns(codes, "Q4_0", name=name)
    raised = (blocks + 8).to(torch.uint8)
    half = CODE_COLUMNS // 2
    wide = _halves(scale, name=name).repeat_interleave(group_size // CODE_COLUMNS, dim=1)[:, : blocks.shape[1]]
    return _blocks(wide, raised[..., :half] | (raised[..., half:] << 4))


def _code_columns(codes: Tensor, kind: str, *, name: str) -> Tensor:
    """Return codes [m, n] as [m, n / 32, 32]; raises CheckpointError where they are no whole blocks of that type."""
    rows, width = codes.shape
    if width % CODE_COLUMNS:
        raise CheckpointError(
            f"{name}: has {width} columns, and GGUF's {kind} takes multiples of {CODE_COLUMNS}; use --to dense"
        )
    return codes.reshape(rows, width // CODE_COLUMNS, -1)


def _blocks(scale: Tensor, codes: Tensor) -> Blocks:
    """Return scale [m, g] float16 and codes [m, g, bytes] interleaved."""
    rows = scale.shape[0]
    parts = (scale.contiguous()[..., None].view(torch.uint8), codes.contiguous().view(torch.uint8))
    found: Any = torch.cat(parts, 2).reshape(rows, -1).cpu().numpy()
    return np.ascontiguousarray(found, dtype=np.uint8)


def _halves(scale: Tensor, *, name: str) -> Tensor:
    half = scale.to(torch.float16)
    off = (half.float() - scale).abs().max() if scale.numel() else torch.zeros(())
    if not bool(off <= ROUNDING * scale.abs().max()):  # infinite where one overflows
        raise CheckpointError(
            f"{name}: its scales, up to {float(scale.abs().max()):.1e}, are outside float16, which is all that GGUF "
            "has; use --to dense"
        )
    return half

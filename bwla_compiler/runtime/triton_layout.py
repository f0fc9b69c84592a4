"""What the Triton kernels read in place of stored tensors: layout P of signs, transposed scales, float32 copies."""

import functools

import torch
from torch import Tensor

from bwla_compiler.codegen.triton_spec import GROUP, padded
from bwla_compiler.runtime.derived import Derived

PACKED_SIGNS: Derived[Tensor] = Derived("Triton layout")
PACKED_SCALES: Derived[Tensor] = Derived("Triton scales")
FLOATS: Derived[Tensor] = Derived("float32 copy")
EXACT: Derived[bool] = Derived("precision")


def forget(tensor: Tensor) -> None:
    """Drop what was derived from this tensor."""
    PACKED_SIGNS.forget(tensor)
    PACKED_SCALES.forget(tensor)
    FLOATS.forget(tensor)
    EXACT.forget(tensor)


def in_words(signs: Tensor) -> bool:
    """Return whether signs are in layout P already: its dtype tells."""
    return signs.dtype == torch.int32


def n_rows(signs: Tensor) -> int:
    """Return the outputs of a linear by its signs, in either layout."""
    return signs.shape[2 if in_words(signs) else 1]


def packed_signs(signs: Tensor, columns: int) -> Tensor:
    """Return layout P of signs: themselves, or derived from canonical ones and kept per tensor."""
    return signs if in_words(signs) else PACKED_SIGNS.get(signs, lambda: words_of(signs, columns))


def words_of(signs: Tensor, columns: int) -> Tensor:
    """Return layout P, int32 [planes, groups, out, 4], of canonical signs uint8 [planes, out, ceil(columns / 8)].

    Bit 8b + p of word c is channel 128 g + 16 p + 4 c + b; channels beyond the last are 0.
    """
    planes, out, n_bytes = signs.shape
    groups = padded(columns) // GROUP
    whole = torch.nn.functional.pad(signs, (0, groups * GROUP // 8 - n_bytes))
    # 16 bytes a group; byte 2p holds words 0 and 1 (c = 0, 1 in its low and high half), byte 2p + 1 words 2 and 3
    source = whole.view(planes, out, groups, 8, 2).permute(0, 2, 1, 3, 4)
    words = torch.zeros(planes, groups, out, 4, dtype=torch.int32, device=signs.device)
    for p, pair in enumerate(source.unbind(-2)):
        half = torch.stack((pair & 15, pair >> 4), -1).flatten(-2).to(torch.int32)
        spread = (half & 1) | (half & 2) << 7 | (half & 4) << 14 | (half & 8) << 21  # bit b to bit 8b
        words |= spread << p
    return words


def bytes_of(words: Tensor, columns: int) -> Tensor:
    """Return the canonical signs uint8 [planes, out, ceil(columns / 8)] of layout P: what `words_of` was given."""
    planes, groups, out, _ = words.shape
    pairs = []
    for p in range(8):
        spread = words >> p
        half = (spread & 1) | (spread >> 7 & 2) | (spread >> 14 & 4) | (spread >> 21 & 8)
        low, high = half.to(torch.uint8).unflatten(-1, (2, 2)).unbind(-1)
        pairs.append(low | high << 4)
    rows = torch.stack(pairs, -2).permute(0, 2, 1, 3, 4).reshape(planes, out, groups * GROUP // 8)
    return rows.narrow(2, 0, -(-columns // 8)).contiguous()


def packed_scale(scale: Tensor) -> Tensor:
    """Return scale [planes, out, groups] as float32 [planes, groups, out], in which lanes of a program read rows.

    One scale a row [planes, out, 1] has the same memory, and stays. A view where the memory lies so already.
    """
    rows = scale if scale.shape[2] == 1 else scale.transpose(1, 2)
    if scale.dtype == torch.float32 and rows.is_contiguous():
        return rows
    return PACKED_SCALES.get(scale, lambda: scale.float().transpose(1, 2).contiguous())


def float32(tensor: Tensor) -> Tensor:
    """Return the tensor as contiguous float32, kept where that is a copy."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return FLOATS.get(tensor, lambda: tensor.to(torch.float32, copy=True).contiguous())


def exact_in_tf32(factor: Tensor) -> bool:
    """Return whether every entry has 11 significant bits or fewer, as float16 bits times a power of two have.

    Kept per tensor: the first question waits for the device.
    """
    return EXACT.get(factor, functools.partial(_is_tf32, factor))


def _is_tf32(factor: Tensor) -> bool:
    return not bool((factor.float().contiguous().view(torch.int32) & 0x1FFF).any())

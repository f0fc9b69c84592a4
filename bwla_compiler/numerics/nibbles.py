"""Signed 4-bit codes with a scale for each group of a row's columns: w ~ s * c, c in -8 to 7, two codes a byte.

The scale of a group carries the sign that gives its largest weight the code -8, so that all sixteen codes are of use.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

LOWEST, HIGHEST = -8, 7
"""Codes."""

CLIPS = tuple(0.65 + 0.05 * step for step in range(8))
"""Scales that are tried, as parts of the one that clips nothing."""


def group_scales(W: Tensor, *, group_size: int) -> Tensor:
    """Return s [m, ceil(n / group_size)] float32 with a low ||w - s c||^2 in each group of columns of W [m, n] float32.

    Of a few clipped ranges the one whose codes c leave the least, ||w||^2 - <w, c>^2 / ||c||^2, at their own best
    scale <w, c> / ||c||^2. NaN in a group that is not finite, 0 in one of zeros.
    """
    groups = _grouped(W, group_size)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best = scale = torch.empty(())
    for number, clip in enumerate(CLIPS):
        codes = _codes(groups, extreme * (clip / LOWEST))
        along, square = (groups * codes).sum(2), codes.square().sum(2).clamp_min(1.0)
        gain = along.square() / square
        if number == 0:
            best, scale = gain, along / square
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, along / square, scale)
    return scale


def nibble_codes(W: Tensor, scale: Tensor, *, group_size: int) -> Tensor:
    """Return the codes of W [m, n] nearest at scale [m, ceil(n / group_size)], as `pack_nibbles` packs them."""
    codes = _codes(_grouped(W, group_size), scale[..., None])
    return pack_nibbles(codes.flatten(1)[:, : W.shape[1]].to(torch.int8))


def pack_nibbles(codes: Tensor) -> Tensor:
    """Return uint8 [..., ceil(n / 2)] of codes [..., n] int8 in -8 to 7.

    Byte k holds column 2k in its low four bits and column 2k + 1 in its high ones, each as code + 8; padding is 0.
    """
    raised = pad((codes + 8).to(torch.uint8), (0, codes.shape[-1] % 2))
    return raised[..., ::2] | (raised[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Return the codes [..., columns] int8 of uint8 [..., ceil(columns / 2)]; undoes `pack_nibbles`."""
    both: Tensor = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :columns]
    return both.to(torch.int8) - 8


def dequantized(packed: Tensor, scale: Tensor, *, columns: int, group_size: int) -> Tensor:
    """Return s * c [..., columns] float32 of packed codes and scale [..., ceil(columns / group_size)]."""
    wide = scale.float().repeat_interleave(group_size, dim=-1)[..., :columns]
    return unpack_nibbles(packed, columns).float() * wide


def _grouped(W: Tensor, group_size: int) -> Tensor:
    """Return W [m, n] as [m, groups, group_size], the last group filled up with zeros."""
    groups: Tensor = pad(W, (0, -W.shape[1] % group_size)).unflatten(1, (-1, group_size))
    return groups


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    codes: Tensor = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(LOWEST, HIGHEST)
    return codes

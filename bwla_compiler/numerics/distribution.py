"""How values are spread: histograms and bimodality of weights, tails of activations, cheap to gather.

Bimodality is Sarle's coefficient (g^2 + 1) / k of skewness g and kurtosis k of the whole population: 1/3 for a normal
distribution, 5/9 for a uniform one, 1 for two values and nothing else.
"""

import math

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.activations import fake_quantize
from bwla_compiler.numerics.spread import BINS, CHANNELS, REACH, Tails, WeightSpread

WEIGHT_SAMPLE, TOKEN_SAMPLE = 1 << 17, 512
"""Weights of a matrix, and tokens of an input, that are looked at."""


def weight_spread(weight: Tensor) -> WeightSpread:
    """Return the spread of a weight [.., out, in], rows along the last axis: of evenly many rows, WEIGHT_SAMPLE values.

    Raises ShapeError where it holds nothing.
    """
    rows = weight.detach().flatten(0, -2)
    if rows.numel() == 0:
        raise ShapeError(f"a weight of shape {list(weight.shape)} has no spread")
    stride = max(1, -(-rows.numel() // WEIGHT_SAMPLE))
    sample = rows[::stride].float()
    values = sample / sample.abs().mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    counts = torch.histc(values.clamp(-REACH, REACH), BINS, -REACH, REACH)
    return WeightSpread(tuple(int(n) for n in counts), _short(bimodality(values)))


def bimodality(values: Tensor) -> float:
    """Return (g^2 + 1) / k of values, any shape; 1/3 where they are all equal."""
    centred = (values - values.mean()).double()
    second = float(centred.square().mean())
    if second == 0:
        return 1 / 3
    skewness = float(centred.pow(3).mean()) / math.sqrt(second) ** 3
    kurtosis = float(centred.pow(4).mean()) / second**2
    return (skewness**2 + 1) / kurtosis


def tails(x: Tensor, *, bits: int) -> Tails:
    """Return the tails of an input x [tokens, n], of TOKEN_SAMPLE tokens evenly taken; bits: 2 to 8, or 16."""
    stride = max(1, -(-x.shape[0] // TOKEN_SAMPLE))
    sample = x.detach()[::stride].float()
    energy = sample.square()
    rms = energy.mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    over = sample / rms
    rounded = fake_quantize(sample, bits=bits)
    total = float(energy.sum()) or 1.0
    return Tails(
        kurtosis=_short(float(over.double().pow(4).mean())),
        peak=_short(float(over.abs().amax(1).mean())),
        bits=bits,
        lost=_short(float((sample - rounded).square().sum()) / total),
        zeroed=_short(float(((rounded == 0) & (sample != 0)).float().mean())),
        channels=_profile(sample.abs().amax(0) / float(energy.mean().sqrt() or 1.0)),
    )


def _profile(largest: Tensor) -> tuple[float, ...]:
    """Return the largest of each part of the channels [n], as even as they can be."""
    parts = largest.tensor_split(min(CHANNELS, largest.numel()))
    return tuple(_short(float(part.max())) for part in parts)


def _short(value: float) -> float:
    """Return four significant digits: reports hold thousands of these."""
    return float(f"{value:.4g}")

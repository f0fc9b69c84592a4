"""How weights and inputs are spread, as plain data: what `distribution` gathers and the inspector draws."""

from dataclasses import dataclass

BINS = 32
"""Of each histogram."""

REACH = 3.2
"""A histogram of weights goes from -REACH to REACH times the row's mean |w|; what is beyond counts in the last bins."""

CHANNELS = 48
"""Parts that a profile of channels is cut into, at most."""


@dataclass(frozen=True)
class WeightSpread:
    """Weights of a matrix, each over the mean |w| of its row. counts: of BINS bins over [-REACH, REACH]."""

    counts: tuple[int, ...]
    bimodality: float


@dataclass(frozen=True)
class Tails:
    """An input, as rounding per token meets it.

    kurtosis: mean fourth power of x over its token's rms (3 for a normal distribution). peak: mean over tokens of
    max |x| over rms. bits: what it is rounded to; lost: share of its energy that this loses; zeroed: share of its
    values that become 0. channels: largest max |x| over the input's rms in each of at most CHANNELS equal parts.
    """

    kurtosis: float
    peak: float
    bits: int
    lost: float
    zeroed: float
    channels: tuple[float, ...]


@dataclass(frozen=True)
class Spread:
    """One linear's weight and input, before anything was done and as they were quantized; None where not gathered."""

    weight_before: WeightSpread | None = None
    weight_after: WeightSpread | None = None
    input_before: Tails | None = None
    input_after: Tails | None = None

"""Timing of contenders in one process: in turn, round after round, so that all meet the same noise."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

COLD_BYTES = 96 << 20
"""Bytes of weights that a round goes through before it meets one again; beyond any last cache that is met here."""


@dataclass(frozen=True)
class Times:
    """Seconds of one call, a figure per round; `ratio` compares two contenders round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median

    def ratio(self, other: "Times") -> float:
        """Return how many times longer the other takes, the median over rounds."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(contenders: Mapping[str, Sequence[Callable[[], object]]], *, rounds: int) -> dict[str, Times]:
    """Time contenders in turn. Each is a sequence of calls, one per copy of its weights; a round makes every call once.

    The first round warms up and is not counted; every other one starts with another contender.
    """
    names = list(contenders)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            calls = contenders[name]
            start = time.perf_counter()
            for call in calls:
                call()
            seconds = (time.perf_counter() - start) / len(calls)
            if turn:
                found[name].append(seconds)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def copies(n_bytes: int) -> int:
    """Return how many copies of a weight of this size make it cold at every call."""
    return max(2, -(-COLD_BYTES // n_bytes))

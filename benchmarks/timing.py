"""Timing of contenders: in turn, round after round, so that all meet the same noise."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Measured = TypeVar("Measured")

LEAST_COLD_BYTES = 96 << 20
TURN_SECONDS = 0.02
"""Long enough for every copy where weights are read once a call; where calls compute for longer, few of them say it."""

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Times:
    """Seconds of one call, a figure per round; ratios compare two contenders round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds that a quarter of the rounds stay below, and above."""
        return quartiles(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles over the median."""
        low, high = self.quartiles
        return (high - low) / 2 / self.median

    def over(self, n: int) -> "Times":
        """Return the times of the n-th part of a call."""
        return Times(tuple(seconds / n for seconds in self.seconds))

    def ratios(self, other: "Times") -> tuple[float, ...]:
        """Return how many times longer the other takes, round by round."""
        return tuple(b / a for a, b in zip(self.seconds, other.seconds, strict=True))

    def ratio(self, other: "Times") -> float:
        """Return how many times longer the other takes, the median over rounds."""
        return statistics.median(self.ratios(other))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile; of fewer than two values the value itself."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def in_turn(contenders: Mapping[str, Callable[[], Measured]], *, rounds: int) -> dict[str, list[Measured]]:
    """Measure contenders in turn and return what each gave, a value per round.

    The first round warms up and is not counted; every other one starts with another contender.
    """
    names = list(contenders)
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            value = contenders[name]()
            if turn:
                found[name].append(value)
    return found


def interleaved(contenders: Mapping[str, Sequence[Callable[[], object]]], *, rounds: int) -> dict[str, Times]:
    """Time contenders in turn. Each is a sequence of calls, one per copy of its weights.

    Every call is made once before, and the first round is not counted: no call that is timed is its first.
    """
    for calls in contenders.values():
        for call in calls:
            call()
    timed = {name: Rotation(calls) for name, calls in contenders.items()}
    return {name: Times(tuple(seconds)) for name, seconds in in_turn(timed, rounds=rounds).items()}


class Rotation:
    """Calls that a contender makes in a circle, a turn at a time; each finds its weights cold.

    A turn is one call at least, every call at most, and over after TURN_SECONDS; the next one goes on from there.
    """

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls, self._next = calls, 0

    def __call__(self) -> float:
        """Take a turn and return the mean seconds of its calls."""
        made, start = 0, time.perf_counter()
        now = start
        while not made or (made < len(self.calls) and now - start < TURN_SECONDS):
            self.calls[self._next]()
            self._next = (self._next + 1) % len(self.calls)
            made += 1
            now = time.perf_counter()
        return (now - start) / made


@functools.cache
def last_cache_bytes(folder: Path = CACHES) -> int:
    """Return the size of the largest cache that a core sees, 0 where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [0]
    for path in folder.glob("index*/size"):
        text = path.read_text("ascii").strip()
        found.append(int(text.rstrip("KM")) * units.get(text[-1:], 1))
    return max(found)


def cold_bytes() -> int:
    """Return the bytes of weights that a round goes through before it meets one again: beyond the last cache."""
    return max(LEAST_COLD_BYTES, 2 * last_cache_bytes())


def copies(n_bytes: int) -> int:
    """Return how many copies of a weight of this size make it cold at every call."""
    return max(2, -(-cold_bytes() // n_bytes))

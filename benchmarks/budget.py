"""A time budget: a measurement stops to begin new cases when the next one would likely not fit."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

Case = TypeVar("Case")


@dataclass
class Budget:
    """Wall seconds that may be spent, counted from its making; inf for no limit.

    left_out: how many cases `within` has not begun. clock: seconds, for tests.
    """

    seconds: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    left_out: int = 0
    _begun: float = field(init=False)

    def __post_init__(self) -> None:
        self._begun = self.clock()

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self.seconds - (self.clock() - self._begun))

    def within(self, cases: Iterable[Case]) -> Iterator[Case]:
        """Yield cases while there is as much time left as the longest so far took; the first one always."""
        longest, waiting = 0.0, list(cases)
        while waiting:
            if longest > self.left:
                self.left_out += len(waiting)
                return
            start = self.clock()
            yield waiting.pop(0)
            longest = max(longest, self.clock() - start)

    def part(self, share: float) -> "Budget":
        """Return a budget of this share of what is left."""
        return Budget(self.left * share, clock=self.clock)

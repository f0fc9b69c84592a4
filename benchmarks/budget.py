"""A time budget: a measurement begins no case that would likely not fit."""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

Case = TypeVar("Case")

LEFT_OUT = "left out: the time budget was spent"
"""What a row says of a case that was not begun."""


@dataclass
class Budget:
    """Wall seconds that may be spent, counted from its making; inf for no limit.

    left_out: the cases that `within` has not begun. clock: seconds, for tests.
    """

    seconds: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    left_out: list[Any] = field(default_factory=list)
    _begun: float = field(init=False)

    def __post_init__(self) -> None:
        self._begun = self.clock()

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self.seconds - (self.clock() - self._begun))

    def within(self, cases: Iterable[Case], *, like: Callable[[Case], Hashable] = lambda case: None) -> Iterator[Case]:
        """Yield the cases that likely fit: those for which as much time is left as the longest of their like took.

        like: what cases are told apart by. The first of its like is expected to take what the quickest like took; the
        first case of all is always begun. One that does not fit is left out, and a shorter one after it may yet fit.
        """
        longest: dict[Hashable, float] = {}
        for case in cases:
            kind = like(case)
            if longest.get(kind, min(longest.values(), default=0.0)) > self.left:
                self.left_out.append(case)
                continue
            start = self.clock()
            yield case
            longest[kind] = max(longest.get(kind, 0.0), self.clock() - start)

    def part(self, share: float) -> "Budget":
        """Return a budget of this share of what is left."""
        return Budget(self.left * share, clock=self.clock)

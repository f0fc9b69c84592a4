"""What else the machine did while something was timed, and threads held to cores."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

STAT = Path("/proc/stat")
STEAL = 7
"""Place of steal among the times of a line "cpu" in /proc/stat: user nice system idle iowait irq softirq steal."""


def cpu_times(path: Path = STAT) -> tuple[int, ...]:
    """Return the machine's processor times since boot in ticks, all cores together; empty where it does not tell."""
    try:
        first = path.read_text("ascii").splitlines()[0].split()
    except (OSError, IndexError):
        return ()
    return tuple(int(word) for word in first[1:9]) if first[0] == "cpu" else ()


def steal_share(before: tuple[int, ...], after: tuple[int, ...]) -> float | None:
    """Return the share of the time between two `cpu_times` that the host gave to others; None where unknown."""
    if len(before) <= STEAL or len(after) <= STEAL:
        return None
    total = sum(after) - sum(before)
    return (after[STEAL] - before[STEAL]) / total if total > 0 else 0.0


@dataclass
class Noise:
    """Seen from `noise()`'s begin to the call of `fields()`: steal, and the load average at both ends."""

    _before: tuple[int, ...] = field(default_factory=cpu_times)
    _load: float = field(default_factory=lambda: os.getloadavg()[0])

    def fields(self) -> dict[str, float | None]:
        """Return {"steal": share or None, "load_before", "load_after"}: runnable processes, mean of a minute."""
        steal = steal_share(self._before, cpu_times())
        return {
            "steal": None if steal is None else round(steal, 4),
            "load_before": round(self._load, 2),
            "load_after": round(os.getloadavg()[0], 2),
        }


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Let torch compute on so many threads, all of this process held to as many cores where the system can."""
    before = torch.get_num_threads()
    allowed = _allowed()
    torch.set_num_threads(threads)
    _hold(sorted(allowed)[:threads])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _hold(allowed)


def _allowed() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()


def _hold(cores: set[int] | list[int]) -> None:
    """Hold every thread of this process, those of pools too, to these cores."""
    if not cores:
        return
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except (OSError, ValueError):
            continue  # a thread that has ended meanwhile

"""How much memory this process holds, and the most that it held, sampled."""

import resource
import threading
from pathlib import Path
from typing import Self

STATUS = Path("/proc/self/status")
ANONYMOUS, MAPPED = ("RssAnon:",), ("RssAnon:", "RssFile:", "RssShmem:")
SAMPLING_SECONDS = 0.005


class PeakMemory:
    """The most memory that was held while this is entered: ever, and since `forget` was called last. In MiB.

    Anonymous memory alone, since pages of mapped files are the system's to drop; mapped: with them, since a model that
    computes from mapped weights does hold those. A thread samples every so many seconds, some 50 microseconds each.
    """

    def __init__(self, *, mapped: bool = False, seconds: float = SAMPLING_SECONDS) -> None:
        self._mapped, self._seconds = mapped, seconds
        self._most = self._recent = 0.0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def fields(self) -> dict[str, float]:
        """Return "peak_mib", the most ever held, and "recent_mib", the most since `forget`."""
        self._look()
        return {"peak_mib": round(self._most, 1), "recent_mib": round(self._recent, 1)}

    def forget(self) -> None:
        """Let the recent peak count anew from here."""
        with self._lock:
            self._recent = 0.0

    def _sample(self) -> None:
        while not self._ended.wait(self._seconds):
            self._look()

    def _look(self) -> None:
        held = held_mib(mapped=self._mapped)
        with self._lock:
            self._recent = max(self._recent, held)
            self._most = max(self._most, held)


def held_mib(*, mapped: bool = False) -> float:
    """Return the resident memory of this process: anonymous, or with mapped files; all it ever held where Linux is not.

    In MiB.
    """
    wanted = MAPPED if mapped else ANONYMOUS
    try:
        lines = STATUS.read_text("ascii").splitlines()
    except OSError:
        lines = []
    found = sum(int(line.split()[1]) for line in lines if line.startswith(wanted))
    return (found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024

"""How much memory this process has held."""

import resource
from pathlib import Path

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory that was held: ever, and since `forget` was called last. In MiB."""

    def __init__(self) -> None:
        self._most = 0.0

    def fields(self) -> dict[str, float]:
        """Return "peak_mib", the most ever held, and "recent_mib", the most since `forget`."""
        recent = _held_mib()
        self._most = max(self._most, recent)
        return {"peak_mib": round(self._most, 1), "recent_mib": round(recent, 1)}

    def forget(self) -> None:
        """Let the recent peak count anew from here, where the system can."""
        self._most = max(self._most, _held_mib())  # the system forgets its own figure of all time with it
        try:
            FORGET.write_text("5")
        except OSError:
            return


def _held_mib() -> float:
    """Return the most that the system has seen this process hold."""
    try:
        lines = STATUS.read_text("ascii").splitlines()
    except OSError:
        lines = []
    seen = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
    return (seen or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024

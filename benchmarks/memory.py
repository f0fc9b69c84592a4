"""How much memory this process has held."""

import resource
from pathlib import Path

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory() -> dict[str, float]:
    """Return MiB: "peak_mib", most ever held, and "recent_mib", most since `forget_peak`."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    recent = _recent_kib()
    return {"peak_mib": round(most, 1), "recent_mib": round(recent / 1024 if recent else most, 1)}


def _recent_kib() -> int:
    try:
        lines = STATUS.read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def forget_peak() -> None:
    """Let the peak of memory count anew from here, where the system can."""
    try:
        FORGET.write_text("5")
    except OSError:
        return

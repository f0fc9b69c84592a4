"""How much memory there is to use."""

import os
from pathlib import Path

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux tells a container's limit, of the second and the first version of its control groups."""


def memory_bytes() -> int:
    """Return the bytes of the machine's memory, or of the container's share; 8 GB where the system does not tell."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        found = 8 << 30
    return min([found, *_limits()])


def _limits() -> list[int]:
    """Return the limits that are numbers: "max" and absent files are none."""
    found = []
    for path in LIMITS:
        try:
            found.append(int(path.read_text("ascii")))
        except (OSError, ValueError):
            continue
    return [limit for limit in found if limit > 0]

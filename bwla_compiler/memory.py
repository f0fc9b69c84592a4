"""How much memory the machine has."""

import os


def memory_bytes() -> int:
    """Return the bytes of the machine's memory; 8 GB where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 8 << 30

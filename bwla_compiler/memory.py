"""How much memory the machine has, and what is said when there is not enough."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from bwla_compiler.errors import OutOfMemory


def memory_bytes() -> int:
    """Return the bytes of the machine's memory; 8 GB where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 8 << 30


@contextlib.contextmanager
def told_of_shortage(what: str, *, remedy: str) -> Iterator[None]:
    """Turn a failed allocation, Python's or torch's on any device, into OutOfMemory: what was done, and the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemory) or not _is_shortage(error):
            raise
        raise OutOfMemory(f"{what}: out of memory{_size(error)}; {remedy}") from error


def _is_shortage(error: Exception) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)  # torch's allocator on the CPU raises a plain RuntimeError


def _size(error: Exception) -> str:
    """Return what could not be had, in torch's own words, where it says so."""
    found = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    return f" (asked for {found[1]})" if found else ""

"""How much memory the machine has, how to give it back, and what is said when there is not enough."""

import contextlib
import ctypes
import errno
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bwla_compiler.errors import OutOfMemory

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


def release() -> None:
    """Give memory that is free, but that the C library holds on to, back to the system; nothing where it cannot.

    glibc takes tensors of less than 32 MiB from its heap, which small live objects keep from shrinking: without this,
    each block of a model leaves its size behind.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], object] | None:
    try:
        found: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # Windows has no such name
        return None
    return found


@contextlib.contextmanager
def told_of_shortage(what: str, *, remedy: str) -> Iterator[None]:
    """Turn a failed allocation, Python's or torch's on any device, into OutOfMemory: what was done, and the remedy.

    Files that could not be mapped for want of addresses are one too.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, OutOfMemory) or not _is_shortage(error):
            raise
        raise OutOfMemory(f"{what}: out of memory{_size(error)}; {remedy}") from error


def _is_shortage(error: Exception) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or getattr(error, "errno", 0) == errno.ENOMEM
    # torch's allocator on the CPU says "can't", its maps of files say "Cannot", both in plain RuntimeErrors
    return known or "allocate memory" in str(error)


def _size(error: Exception) -> str:
    """Return what could not be had, in torch's own words, where it says so."""
    found = re.search(r"(?:tried to allocate|unable to mmap) ([\d.]+ \w+)", str(error), re.IGNORECASE)
    return f" (asked for {found[1]})" if found else ""

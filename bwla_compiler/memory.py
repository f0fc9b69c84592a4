"""How much memory the machine has, how to give it back, and what is said when there is not enough."""

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Callable, Iterator

import torch

from bwla_compiler.errors import OutOfMemory


def memory_bytes() -> int:
    """Return the bytes of the machine's memory; 8 GB where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 8 << 30


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

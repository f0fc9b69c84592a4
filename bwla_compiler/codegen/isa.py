"""Which instruction set this processor has: "avx512", "avx2" or "portable"."""

import functools
import platform
from pathlib import Path
from typing import Literal

Isa = Literal["avx512", "avx2", "portable"]

ISAS: tuple[Isa, ...] = ("avx512", "avx2", "portable")
"""Every instruction set with an emitter, best first."""

NEEDS: dict[Isa, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"}),
    "avx2": frozenset({"avx2", "fma"}),
    "portable": frozenset(),
}
"""Processor flags that a kernel of each instruction set executes, named as Linux names them."""

FLAGS: dict[Isa, tuple[str, ...]] = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
"""Compiler flags of each instruction set; explicit, so that a cached library never depends on -march=native."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's feature flags as /proc/cpuinfo spells them; empty where it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    words = (line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    return frozenset(next(words, []))


def supported(isa: Isa) -> bool:
    """Return whether this processor runs kernels emitted for `isa`."""
    return NEEDS[isa] <= cpu_flags()


def best_isa() -> Isa:
    """Return the fastest instruction set that this processor runs."""
    return next(isa for isa in ISAS if supported(isa))


def describe() -> str:
    """Return one line for people: the machine, and the instruction set that kernels are emitted for."""
    return f"{platform.machine()}: {best_isa()}"

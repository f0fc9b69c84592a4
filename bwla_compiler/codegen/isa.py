"""Which instruction set this processor has: "amx", "avx512vbmi", "avx512", "avx2", "neon" or "portable"."""

import functools
import platform
from pathlib import Path
from typing import Literal

Isa = Literal["amx", "avx512vbmi", "avx512", "avx2", "neon", "portable"]

ISAS: tuple[Isa, ...] = ("amx", "avx512vbmi", "avx512", "avx2", "neon", "portable")
"""Every instruction set with an emitter, best first."""

_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma")
_VBMI = (*_AVX512, "avx512vbmi", "avx512_vnni")
_AMX = (*_VBMI, "amx_tile", "amx_int8", "amx_bf16")

NEEDS: dict[Isa, frozenset[str]] = {
    "amx": frozenset(_AMX),
    "avx512vbmi": frozenset(_VBMI),
    "avx512": frozenset(_AVX512),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "neon": frozenset({"asimd"}),
    "portable": frozenset(),
}
"""Processor flags that a kernel of each instruction set executes, named as Linux names them."""


def _with(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Return the compiler's words for flags that Linux spells so."""
    words = (flag.replace("avx512_", "avx512").replace("_", "-") for flag in flags)
    return (*(f"-m{word}" for word in words), "-mprefer-vector-width=512")


FLAGS: dict[Isa, tuple[str, ...]] = {
    "amx": _with(_AMX),
    "avx512vbmi": _with(_VBMI),
    "avx512": _with(_AVX512),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "neon": ("-march=armv8-a",),
    "portable": (),
}
"""Compiler flags of each instruction set; explicit, so that a cached library never depends on -march=native."""


CPU_INFO = Path("/proc/cpuinfo")
"""Where Linux lists the processor's features: under "flags" on x86, under "Features" on Arm."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's feature flags as /proc/cpuinfo spells them.

    Where it cannot be read: "asimd" on 64-bit Arm, all of which has NEON (macOS has no such file); else none.
    """
    arm = platform.machine().lower() in ("aarch64", "arm64")
    always = frozenset({"asimd"} if arm else ())
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return always
    label = "Features" if arm else "flags"
    words = (line.partition(":")[2].split() for line in lines if line.startswith(label))
    return always | frozenset(next(words, []))


def supported(isa: Isa) -> bool:
    """Return whether this processor runs kernels emitted for `isa`."""
    return NEEDS[isa] <= cpu_flags()


def best_isa() -> Isa:
    """Return the fastest instruction set that this processor runs."""
    return next(isa for isa in ISAS if supported(isa))


def describe() -> str:
    """Return one line for people: the machine, and the instruction set that kernels are emitted for."""
    return f"{platform.machine()}: {best_isa()}"

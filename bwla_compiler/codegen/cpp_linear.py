"""The C++ source of every kernel of one instruction set: one self-contained translation unit without torch."""

from bwla_compiler.codegen import (
    cpp_amx,
    cpp_amx_ends,
    cpp_amx_transform,
    cpp_avx2,
    cpp_avx512,
    cpp_driver,
    cpp_ends,
    cpp_entries,
    cpp_int4,
    cpp_neon,
    cpp_portable,
    cpp_prologue,
    cpp_transform,
)
from bwla_compiler.codegen.isa import Isa

KERNELS: dict[Isa, str] = {
    "amx": cpp_avx512.KERNELS,
    "avx512": cpp_avx512.KERNELS,
    "avx2": cpp_avx2.KERNELS,
    "neon": cpp_neon.KERNELS,
    "portable": cpp_portable.KERNELS,
}


def emit(isa: Isa) -> str:
    """Return the C++17 source of all kernels for `isa`; the entries it exports are declared in library.py."""
    parts = (
        f"// bwla kernels for {isa}; generated",
        cpp_driver.HEADER,
        KERNELS[isa],
        cpp_driver.THREADS,
        cpp_transform.VECTORS,
        cpp_driver.ROUNDING,
        cpp_driver.SWEEP,
        *((cpp_amx.TILES, cpp_amx.PARTS) if isa == "amx" else ()),
        cpp_transform.PRODUCT,
        *((cpp_amx_transform.SPLIT,) if isa == "amx" else ()),
        cpp_transform.TRANSFORM,
        cpp_prologue.FUNCTIONS,
        cpp_prologue.PROLOGUE,
        cpp_ends.DOTS,
        cpp_entries.LINEAR,
        *((cpp_amx.PANEL, cpp_amx_ends.INT8) if isa == "amx" else ()),
        cpp_entries.ENTRIES,
        cpp_ends.INT8,
        cpp_ends.EMBEDDING,
        cpp_int4.INT4,
    )
    return "\n".join(part.strip("\n") for part in parts) + "\n"

"""The C++ source of every kernel of one instruction set: one self-contained translation unit without torch."""

from bwla_compiler.codegen import (
    cpp_amx,
    cpp_amx_attention,
    cpp_amx_digits,
    cpp_amx_ends,
    cpp_amx_linear,
    cpp_amx_parts,
    cpp_amx_transform,
    cpp_attention,
    cpp_attention_prompt,
    cpp_avx2,
    cpp_avx512,
    cpp_cache,
    cpp_digits,
    cpp_driver,
    cpp_ends,
    cpp_entries,
    cpp_hadamard,
    cpp_int4,
    cpp_neon,
    cpp_portable,
    cpp_prologue,
    cpp_shorts,
    cpp_sweep,
    cpp_transform,
    cpp_vbmi,
)
from bwla_compiler.codegen.isa import Isa

KERNELS: dict[Isa, str] = {
    "amx": cpp_avx512.COMMON + cpp_vbmi.KERNELS + cpp_avx512.FLOAT,
    "avx512vbmi": cpp_avx512.COMMON + cpp_vbmi.KERNELS + cpp_avx512.FLOAT,
    "avx512": cpp_avx512.COMMON + cpp_avx512.KERNELS + cpp_avx512.FLOAT,
    "avx2": cpp_avx2.KERNELS,
    "neon": cpp_neon.KERNELS,
    "portable": cpp_portable.KERNELS,
}


def emit(isa: Isa) -> str:
    """Return the C++17 source of all kernels for `isa`; the entries it exports are declared in library.py."""

    def with_amx(*texts: str) -> tuple[str, ...]:
        return texts if isa == "amx" else ()

    def with_vbmi(*texts: str) -> tuple[str, ...]:
        return texts if isa in ("amx", "avx512vbmi") else ()

    parts = (
        f"// bwla kernels for {isa}; generated",
        cpp_driver.HEADER,
        KERNELS[isa],
        cpp_driver.THREADS,
        cpp_transform.VECTORS,
        cpp_driver.ROUNDING,
        cpp_sweep.SWEEP,
        *with_amx(cpp_amx.TILES, cpp_amx_parts.PARTS),
        cpp_transform.PRODUCT,
        *with_amx(cpp_amx_transform.SPLIT),
        cpp_transform.SIDES,
        cpp_transform.SCALE,
        cpp_hadamard.HADAMARD,
        cpp_transform.TRANSFORM,
        cpp_prologue.FUNCTIONS,
        cpp_prologue.PROLOGUE,
        cpp_ends.DOTS,
        *with_vbmi(cpp_digits.SPLIT, cpp_digits.DOTS),
        *((cpp_shorts.DOTS,) if isa == "avx2" else ()),
        cpp_entries.LINEAR,
        *with_amx(cpp_amx_linear.PANEL, cpp_amx_digits.DIGITS, cpp_amx_ends.INT8),
        cpp_entries.ENTRIES,
        cpp_ends.INT8,
        cpp_ends.EMBEDDING,
        cpp_int4.INT4,
        cpp_cache.TURN,
        cpp_attention.STEP,
        cpp_attention_prompt.ROWS,
        cpp_attention_prompt.VECTORS,
        *with_amx(cpp_amx_attention.TILED),
        cpp_attention.ENTRY,
        cpp_cache.ROWS,
    )
    return "\n".join(part.strip("\n") for part in parts) + "\n"

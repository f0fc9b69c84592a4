"""What ggml takes for granted of AMX tiles: that the process may use them, and that threads keep them laid out.

ggml lays tiles out at a thread's first product; oneDNN, which multiplies bfloat16 for torch, gives them back after each
of its own, and the next product of ggml on that thread would be an illegal instruction.
"""

import ctypes
import functools

from bwla_compiler.codegen.build import COMMON_FLAGS, build_library
from bwla_compiler.codegen.isa import cpu_flags

SOURCE = r"""
#include <sys/syscall.h>
#include <unistd.h>
extern "C" long tiles_allow() {
  const long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}
typedef char Layout[64];
extern "C" void tiles_save(Layout* to) { asm volatile("sttilecfg %0" : "=m"(*to)); }
extern "C" void tiles_load(const Layout* from) {
  if ((*from)[0]) asm volatile("ldtilecfg %0" ::"m"(*from));
}
"""


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return what saves and loads layouts; None where a processor has no tiles."""
    if "amx_tile" not in cpu_flags():
        return None
    path = build_library(SOURCE, "tiles", flags=(*COMMON_FLAGS, "-mamx-tile"))
    return None if path is None else ctypes.CDLL(str(path))


@functools.cache
def allow_tiles() -> None:
    """Ask the operating system for tiles, where the processor has them, on behalf of libraries that do not."""
    if library := _library():
        library.tiles_allow()


class KeptTiles:
    """What a library expects of the calling thread's tiles: `restore` before its calls, `keep` after its first."""

    def __init__(self) -> None:
        self._layout = (ctypes.c_char * 64)()

    def restore(self) -> None:
        """Lay tiles out as they were kept, if they were; before, ask for them."""
        allow_tiles()
        if library := _library():
            library.tiles_load(self._layout)

    def keep(self) -> None:
        """Remember how they are laid out now."""
        if library := _library():
            library.tiles_save(self._layout)


GGML = KeptTiles()
"""Those of ggml on the thread that calls it, whichever library carries it."""

"""The operators in C++: built once, then put before the Python implementations, whose calls cost ten times more."""

import ctypes
import functools
import logging
import threading
from array import array
from ctypes import c_char_p, c_long, c_void_p
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from bwla_compiler.codegen.isa import Isa
from bwla_compiler.codegen.library import KernelLibrary
from bwla_compiler.codegen.torch_library import build_operators
from bwla_compiler.errors import BuildError
from bwla_compiler.runtime import compiled, expert_products, triton_layout
from bwla_compiler.runtime.halves import DECODED, WHOLE
from bwla_compiler.settings import chosen_kernels

log = logging.getLogger(__name__)

ALWAYS = 2**62
"""More tokens than there are."""


class EndTokens(NamedTuple):
    """For how many tokens the kernels of a head serve; beyond, torch's float product on chunks of rows is faster."""

    int8: int
    int4: int


END_TOKENS: dict[Isa, EndTokens] = {
    "amx": EndTokens(ALWAYS, 128),
    "avx512vbmi": EndTokens(128, 128),
    "avx512": EndTokens(128, 128),
    "avx2": EndTokens(ALWAYS, 128),
    "neon": EndTokens(16, 32),
    "portable": EndTokens(8, 32),
}
"""By instruction set; measured with AMX, AVX-512 and AVX2 (Xeon, EPYC), guessed from them elsewhere."""


class NativeOperators:
    """The compiled library of operators at `path`, over `kernels`. Raises BuildError where it does not load."""

    def __init__(self, path: Path, kernels: KernelLibrary) -> None:
        self.registered = False
        self._entries = kernels.addresses()
        self._tokens = END_TOKENS[kernels.isa]
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"{path} does not load: {error}; delete it to have it built anew") from error
        self._library.bwla_register.argtypes = [c_void_p, c_long, c_long]
        self._library.bwla_forget.argtypes = [c_void_p]
        self._library.bwla_derived.restype = c_long
        self._library.bwla_team.restype, self._library.bwla_team.argtypes = c_long, [c_long]
        self._library.bwla_bound.restype = c_void_p
        self._library.bwla_free.argtypes = [c_void_p]
        self._library.bwla_enter.restype, self._library.bwla_enter.argtypes = c_void_p, [c_void_p]
        self._library.bwla_bind.restype = c_long
        self._library.bwla_bind.argtypes = [c_void_p, c_char_p, c_void_p, c_long, c_void_p, c_void_p, c_long]

    def register(self) -> None:
        """Put the operators before the Python implementations: they serve from the next call on."""
        if not self.registered:
            self._library.bwla_register(self._entries, *self._tokens)
        self.registered = True

    def unregister(self) -> None:
        """Take them back: the Python implementations serve again; derived values are dropped."""
        if self.registered:
            self._library.bwla_unregister()
        self.registered = False

    def forget(self, tensor: Tensor) -> None:
        """Drop what was derived from this tensor."""
        self._library.bwla_forget(tensor._cdata)

    def team(self, wanted: int) -> int:
        """Return on how many of torch's threads the kernels compute where so many are wanted."""
        return int(self._library.bwla_team(wanted))

    def new_bound(self) -> int:
        """Return where routines are bound (see `programs.Bound`), empty, for `free_bound` in the end."""
        return int(self._library.bwla_bound())

    def free_bound(self, bound: int) -> None:
        """Drop bound routines."""
        self._library.bwla_free(bound)

    def enter_bound(self, bound: int | None) -> int | None:
        """Have the calling thread run these routines, or none, and return those that it ran before."""
        before: int | None = self._library.bwla_enter(bound)
        return before

    def bind(self, bound: int, text: str, words: "array[int]", numbers: "array[float]", weights: "array[int]") -> bool:
        """Add a routine bound to weights, by the addresses of their TensorImpls; see `programs`.

        Returns whether it can be: all fits, and edits of the weights can be seen.
        """
        read = (words.buffer_info()[0], len(words), numbers.buffer_info()[0])
        return bool(self._library.bwla_bind(bound, text.encode(), *read, *weights.buffer_info()))

    def derived(self) -> int:
        """Return how many kernel layouts and decoded scales were made since the library was loaded."""
        return int(self._library.bwla_derived())


@functools.cache
def operators() -> NativeOperators | None:
    """Return the operators, built where needed; None where there is no compiler, or, with a warning, where it fails."""
    kernels = compiled.kernels()
    if kernels is None:
        return None
    try:
        path = build_operators()
        return None if path is None else NativeOperators(path, kernels)
    except BuildError as error:
        log.warning(
            "the C++ operators could not be built, so each call of a quantized linear goes through Python and costs "
            "some 100 microseconds more: %s",
            error,
        )
        return None


def forget(tensor: Tensor) -> None:
    """Drop what any implementation derived from this tensor, after an edit through `.data` that cannot be seen."""
    for cache in (*compiled.CACHES, *expert_products.CACHES, WHOLE, DECODED):
        cache.forget(tensor)
    triton_layout.forget(tensor)
    found = operators() if wanted() else None
    if found is not None:
        found.forget(tensor)


_GATE = threading.Lock()


def wanted() -> bool:
    """Return whether C++ may compute on the CPU: BWLA_KERNELS is auto or cpp."""
    return chosen_kernels() in ("auto", "cpp")


def install() -> bool:
    """Build and register the operators if they are wanted, and that was not done or tried before.

    Returns whether they serve from now on.
    """
    if not wanted():
        return False
    with _GATE:
        found = operators()
        if found is not None:
            found.register()
        return found is not None

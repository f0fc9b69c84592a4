"""The compiled kernels of one instruction set, callable from Python by ctypes on raw addresses.

All arrays are contiguous; addresses are what `tensor.data_ptr()` gives, 0 for "none". Nothing here knows torch.
"""

import ctypes
import functools
import logging
from ctypes import POINTER, c_float, c_int, c_long, c_void_p
from pathlib import Path

from bwla_compiler.codegen.build import build
from bwla_compiler.codegen.cpp_linear import emit
from bwla_compiler.codegen.isa import Isa, best_isa
from bwla_compiler.errors import BuildError
from bwla_compiler.settings import settings

log = logging.getLogger(__name__)

GROUP = 128
"""Columns that share one scale in weights with group scales; the kernels know no other group size."""


RIGHT, LEFT, SIGNS, SCALE = range(4)
"""How a factor of a transform is packed: a matrix on the right or the left, v of diag(v) H on the right, or the scale
of channels before them."""


class Member(ctypes.Structure):
    """One linear of those that share an input; mirrors `struct Member` of the emitted source.

    signs: packed by `pack`. scale: [planes, out] float32, or packed by `pack_scale` where groups > 1.
    rank_in [rank, in] int8, rank_out packed by `pack_pair`, rank_scale [rank], bias [out], y and residual
    [tokens, out] float32.
    """

    _fields_ = (
        *((name, c_void_p) for name in ("signs", "scale", "rank_in", "rank_out", "rank_scale", "bias", "y")),
        *((name, c_long) for name in ("out_features", "planes", "groups", "rank")),
        ("residual", c_void_p),
    )


class Prologue(ctypes.Structure):
    """What happens to a token before it is rounded; mirrors `struct Prologue` of the emitted source.

    kind: its place in PROLOGUES. gate [tokens, in], gain, shift [in] float32; scale, left and right packed by
    `pack_factor`, of in, n1 and n2 channels.
    """

    _fields_ = (
        ("kind", c_long),
        ("eps", c_float),
        *((name, c_void_p) for name in ("gate", "gain", "shift", "scale", "left", "right")),
        ("n1", c_long),
        ("n2", c_long),
    )


_LONGS: dict[str, tuple[type, tuple[type, ...]]] = {
    "packed_bytes": (c_long, (c_long,) * 3),
    "packed_scales": (c_long, (c_long,) * 3),
    "packed_pair": (c_long, (c_long,) * 2),
    "packed_factor": (c_long, (c_long,) * 2),
}
_CALLS: dict[str, tuple[type, ...]] = {
    "pack": (c_void_p, c_void_p, c_long, c_long, c_long, c_long),
    "pack_scale": (c_void_p, c_void_p, c_long, c_long, c_long),
    "pack_pair": (c_void_p, c_void_p, c_long, c_long),
    "pack_factor": (c_void_p, c_void_p, c_long, c_long),
    "prologue": (c_void_p, c_void_p, c_void_p, c_long, c_long, c_long),
    "fused_group": (c_void_p, c_void_p, c_void_p, c_long, c_long, c_int, POINTER(Member), c_long, c_long),
    "linear": (c_void_p, c_void_p, c_long, c_long, c_int, POINTER(Member), c_long, c_long),
    "quantize": (c_void_p, c_void_p, c_long, c_long, c_int, c_void_p, c_void_p),
    "accumulate": (c_void_p, c_void_p, c_long, c_long, c_long, c_int, c_void_p),
    "int8_linear": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_long, c_long),
    "int4_linear": (*(c_void_p,) * 5, *(c_long,) * 6),
    "int4_embedding": (*(c_void_p,) * 4, *(c_long,) * 4),
    "transform": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_long, c_long),
    "int8_embedding": (c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long),
    "use_team": (c_void_p,),
    "attend": (c_void_p, c_long),
    "place": (c_void_p, c_long),
}

OPS_ENTRIES = (
    "packed_bytes", "packed_scales", "pack", "pack_scale", "linear", "int8_linear", "transform", "int8_embedding",
    "use_team", "fused_group", "prologue", "int4_linear", "int4_embedding", "packed_pair",
    "pack_pair", "packed_factor", "pack_factor", "attend", "place",
)  # fmt: skip
"""The entries that the C++ operators call, in the order of their `struct Kernels`."""


class KernelLibrary:
    """The C entries of one compiled library; the emitted source documents each, under the name bwla_<entry>.

    isa: what it was emitted for. Raises BuildError where the library does not load.
    """

    def __init__(self, path: Path, isa: Isa) -> None:
        self.isa = isa
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"{path} does not load: {error}; delete it to have it built anew") from error
        for name, (result, arguments) in _LONGS.items():
            self._declare(name, result, arguments)
        for name, arguments in _CALLS.items():
            self._declare(name, None, arguments)
        self.packed_bytes = self._library.bwla_packed_bytes
        self.packed_scales = self._library.bwla_packed_scales
        self.pack = self._library.bwla_pack
        self.pack_scale = self._library.bwla_pack_scale
        self.packed_pair = self._library.bwla_packed_pair
        self.pack_pair = self._library.bwla_pack_pair
        self.packed_factor = self._library.bwla_packed_factor
        self.pack_factor = self._library.bwla_pack_factor
        self.linear = self._library.bwla_linear
        self.fused_group = self._library.bwla_fused_group
        self.quantize = self._library.bwla_quantize
        self.accumulate = self._library.bwla_accumulate
        self.int8_linear = self._library.bwla_int8_linear
        self.int4_linear = self._library.bwla_int4_linear
        self.int4_embedding = self._library.bwla_int4_embedding
        self.transform = self._library.bwla_transform
        self.int8_embedding = self._library.bwla_int8_embedding
        self.use_team = self._library.bwla_use_team
        self.attend = self._library.bwla_attend
        self.place = self._library.bwla_place

    def addresses(self) -> ctypes.Array[c_void_p]:
        """Return the addresses of OPS_ENTRIES, as `bwla_register` of the C++ operators takes them."""
        found = [ctypes.cast(getattr(self._library, f"bwla_{name}"), c_void_p) for name in OPS_ENTRIES]
        return (c_void_p * len(found))(*found)

    def _declare(self, name: str, result: type | None, arguments: tuple[type, ...]) -> None:
        entry = getattr(self._library, f"bwla_{name}")
        entry.restype, entry.argtypes = result, list(arguments)


@functools.cache
def load(isa: Isa) -> KernelLibrary | None:
    """Return the kernels of `isa`, built where needed; None where there is no compiler. Raises BuildError."""
    source = emit(isa)
    if dump := settings().dump:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"kernels-{isa}.cpp").write_text(source)
    path = build(source, isa)
    return None if path is None else KernelLibrary(path, isa)


def best_library() -> KernelLibrary | None:
    """Return the kernels of the best instruction set of this processor; None where there is no compiler.

    Where the compiler is too old for AMX (before GCC 11), with a warning those of AVX-512. Raises BuildError.
    """
    best = best_isa()
    try:
        return load(best)
    except BuildError as error:
        if best != "amx":
            raise
        log.warning("no kernels for AMX, so prompts are read with AVX-512; a newer compiler would help: %s", error)
        return load("avx512vbmi")

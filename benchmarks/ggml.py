"""ggml's matrix product as a contender, by ctypes on the library that llama-cpp-python carries.

Weights lie where llama.cpp would put them: in the CPU backend's repacked buffers for types that it repacks.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import tiles

TYPES = {"BF16": 30, "Q8_0": 8, "Q4_0": 2, "Q1_0": 41, "TQ2_0": 35, "IQ1_S": 19}
"""ggml's numbers of the types that are compared."""

AMX_ROWS = 32
"""What ggml's products by AMX tiles need the number of rows to be a multiple of."""

_POINTERS = (
    "ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_backend_cpu_init", "ggml_get_data",
    "ggml_backend_alloc_ctx_tensors_from_buft", "ggml_backend_cpu_buffer_type", "ggml_backend_get_device",
    "ggml_backend_dev_backend_reg", "ggml_backend_reg_get_proc_address",
)  # fmt: skip


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def _say_nothing(level: int, text: bytes, data: object) -> None:
    """Take ggml's notes, of which each repacked weight is one."""


_SILENCE = _LogCallback(_say_nothing)  # ggml keeps its address


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The library; see `ggml()`."""

    def __init__(self, folder: Path) -> None:
        mode = ctypes.RTLD_GLOBAL
        self._parts = [ctypes.CDLL(str(folder / f"libggml{part}.so"), mode=mode) for part in ("-base", "-cpu", "")]
        self._function("ggml_log_set")(_SILENCE, None)
        for name in _POINTERS:
            self._function(name).restype = ctypes.c_void_p
        self._function("ggml_quantize_chunk").restype = ctypes.c_size_t
        self._function("ggml_row_size").restype = ctypes.c_size_t
        self._function("ggml_blck_size").restype = ctypes.c_int64
        self._function("ggml_type_name").restype = ctypes.c_char_p
        self.backend = self._call("ggml_backend_cpu_init")
        self.version = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"

    def _function(self, name: str) -> Any:
        for part in self._parts:
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(f"ggml of llama-cpp-python has no {name}")

    def _call(self, name: str, *arguments: object) -> int:
        wrapped = [ctypes.c_void_p(a) if isinstance(a, int) and not isinstance(a, bool) else a for a in arguments]
        result = self._function(name)(*wrapped)
        return int(result or 0)

    def has(self, kind: str) -> bool:
        """Whether this build knows a type."""
        name = self._function("ggml_type_name")(ctypes.c_int(TYPES[kind]))
        return bool(name) and name.decode().upper() == kind

    def fits(self, kind: str, width: int) -> bool:
        """Whether rows of so many columns are whole blocks of a type: ggml aborts the process where they are not."""
        block = self._function("ggml_blck_size")(ctypes.c_int(TYPES[kind]))
        return bool(width % block == 0)

    def features(self) -> str:
        """Return the instruction sets that it was built for."""
        asked = ("avx2", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_int8")
        return " ".join(name for name in asked if self._call(f"ggml_cpu_has_{name}"))

    def packed(self, weight: Tensor, kind: str) -> np.ndarray:
        """Return weight [out, in] rounded to a type, its rows one behind the other: uint8 [bytes].

        Types that must know how important each column is are told that all are alike.
        """
        out, width = weight.shape
        kind_number, source = ctypes.c_int(TYPES[kind]), weight.float().contiguous().numpy()
        row_bytes = self._function("ggml_row_size")(kind_number, ctypes.c_int64(width))
        packed = np.empty(out * row_bytes, dtype=np.uint8)
        asks = bool(self._call("ggml_quantize_requires_imatrix", kind_number) & 1)
        importance = np.ones(width, dtype=np.float32) if asks else None
        self._function("ggml_quantize_chunk")(
            kind_number, ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(packed.ctypes.data),
            ctypes.c_int64(0), ctypes.c_int64(out), ctypes.c_int64(width),
            None if importance is None else ctypes.c_void_p(importance.ctypes.data),
        )  # fmt: skip
        return packed

    def linear(
        self, kind: str, packed: np.ndarray, *, shape: tuple[int, int], tokens: int, threads: int
    ) -> "GgmlLinear":
        """Return y = x weight^T with weight [out, in] as `packed` gives it, for x [tokens, in]."""
        return GgmlLinear(self, kind, packed, shape, tokens, threads)


class GgmlLinear:
    """A product of one weight; `run()` computes it on `x`, which is float32 [tokens, in] shared with ggml."""

    def __init__(
        self, library: Ggml, kind: str, packed: np.ndarray, of: tuple[int, int], tokens: int, threads: int
    ) -> None:
        self.ggml, self.threads = library, threads
        out, width = of
        call, kind_number = library._call, ctypes.c_int(TYPES[kind])
        init = library._function("ggml_init")
        shape = (ctypes.c_int64(width), ctypes.c_int64(out))
        self._weights = init(_InitParams(1 << 16, None, True))
        tensor = call("ggml_new_tensor_2d", self._weights, kind_number, *shape)
        buffer_type = self._repacked(kind, out) or call("ggml_backend_cpu_buffer_type")
        call("ggml_backend_alloc_ctx_tensors_from_buft", self._weights, buffer_type)
        call("ggml_backend_tensor_set", tensor, packed.ctypes.data, ctypes.c_size_t(0), ctypes.c_size_t(packed.nbytes))
        self._context = init(_InitParams((tokens * (width + out)) * 4 + (1 << 20), None, False))
        f32 = ctypes.c_int(0)
        source = call("ggml_new_tensor_2d", self._context, f32, shape[0], ctypes.c_int64(tokens))
        product = call("ggml_mul_mat", self._context, tensor, source)
        self._graph = call("ggml_new_graph", self._context)
        call("ggml_build_forward_expand", self._graph, product)
        self.x = _tensor_at(call("ggml_get_data", source), (tokens, width))
        self.y = _tensor_at(call("ggml_get_data", product), (tokens, out))

    def _repacked(self, kind: str, out: int) -> int:
        """Return the buffer type of repacked weights where this type has one; that for AMX is the first of them."""
        if kind not in ("Q4_0", "Q8_0"):
            return 0
        device = self.ggml._call("ggml_backend_get_device", self.ggml.backend)
        registry = self.ggml._call("ggml_backend_dev_backend_reg", device)
        getter = self.ggml._call(
            "ggml_backend_reg_get_proc_address", registry, ctypes.c_char_p(b"ggml_backend_dev_get_extra_bufts")
        )
        if not getter:
            return 0
        ask = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(getter)
        found = ask(device)
        skipped = int("amx_int8" in self.ggml.features() and out % AMX_ROWS != 0)
        return int(found[skipped] or 0) if found else 0

    def run(self) -> Tensor:
        """Return y [tokens, out], valid until the next run."""
        self.ggml._call("ggml_backend_cpu_set_n_threads", self.ggml.backend, ctypes.c_int(self.threads))
        tiles.GGML.restore()
        self.ggml._call("ggml_backend_graph_compute", self.ggml.backend, self._graph)
        tiles.GGML.keep()
        return self.y

    def __del__(self) -> None:
        for context in (self._context, self._weights):
            self.ggml._call("ggml_free", context)


def _tensor_at(address: int, shape: tuple[int, int]) -> Tensor:
    buffer = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
    return torch.from_numpy(np.ctypeslib.as_array(buffer).reshape(shape))


@functools.cache
def ggml() -> Ggml | None:
    """Return ggml where llama-cpp-python is installed, else None."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "lib"
    return Ggml(folder) if (folder / "libggml-cpu.so").is_file() else None

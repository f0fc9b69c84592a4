"""What the machine allows: bytes read and copied a second, and operations a second, measured beside the kernels.

Emitted as C++ for the instruction set of the kernels, on as many threads. They are the roofline that the figures of
the same run are held against: no kernel reads faster than a loop that does nothing else.
"""

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.noise import pinned
from benchmarks.timing import cold_bytes, interleaved
from bwla_compiler.codegen.build import COMMON_FLAGS, build_library
from bwla_compiler.codegen.isa import FLAGS, best_isa, cpu_flags
from bwla_compiler.errors import BuildError

ROUNDS = 7
FLOAT_REPEATS, INT8_REPEATS = 400_000, 400_000

SOURCE = r"""
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#define DOOR extern "C" __attribute__((visibility("default")))

DOOR uint64_t read_all(const uint64_t* from, long n) {
  uint64_t sum[32] = {};
  for (long i = 0; i + 32 <= n; i += 32) {
    __builtin_prefetch(from + i + 512);
    __builtin_prefetch(from + i + 520);
    __builtin_prefetch(from + i + 528);
    __builtin_prefetch(from + i + 536);
    for (int j = 0; j < 32; j++) sum[j] += from[i + j];
  }
  uint64_t total = 0;
  for (uint64_t s : sum) total += s;
  return total;
}

DOOR void copy_all(uint64_t* to, const uint64_t* from, long n) { std::memcpy(to, from, 8 * n); }

// Chains of fused multiply-adds that do not wait for each other; returns how many a call makes for each repeat.
DOOR long float_peak(long repeats, float* out) {
#if defined(__AVX512F__)
  __m512 a[12], x = _mm512_set1_ps(out[0]), y = _mm512_set1_ps(out[1]);
  for (auto& v : a) v = x;
  for (long i = 0; i < repeats; i++)
    for (auto& v : a) v = _mm512_fmadd_ps(v, x, y);
  for (int j = 1; j < 12; j++) a[0] = _mm512_add_ps(a[0], a[j]);
  out[2] = _mm512_reduce_add_ps(a[0]);
  return 12 * 16;
#elif defined(__AVX2__)
  __m256 a[12], x = _mm256_set1_ps(out[0]), y = _mm256_set1_ps(out[1]);
  for (auto& v : a) v = x;
  for (long i = 0; i < repeats; i++)
    for (auto& v : a) v = _mm256_fmadd_ps(v, x, y);
  for (int j = 1; j < 12; j++) a[0] = _mm256_add_ps(a[0], a[j]);
  float lanes[8];
  _mm256_storeu_ps(lanes, a[0]);
  out[2] = 0;
  for (float lane : lanes) out[2] += lane;
  return 12 * 8;
#else
  float a[8], x = out[0], y = out[1];
  for (auto& v : a) v = x;
  for (long i = 0; i < repeats; i++)
    for (auto& v : a) v = v * x + y;
  out[2] = 0;
  for (float v : a) out[2] += v;
  return 8;
#endif
}

// The same of int8 products summed in int32, by the widest instruction there is; 0 where there is none.
DOOR long int8_peak(long repeats, int32_t* out) {
#if defined(__AVX512VNNI__)
  __m512i a[12], x = _mm512_set1_epi32(out[0]), y = _mm512_set1_epi32(out[1]);
  for (auto& v : a) v = x;
  for (long i = 0; i < repeats; i++)
    for (auto& v : a) v = _mm512_dpbusd_epi32(v, x, y);
  for (int j = 1; j < 12; j++) a[0] = _mm512_add_epi32(a[0], a[j]);
  out[2] = _mm512_reduce_add_epi32(a[0]);
  return 12 * 64;
#else
  (void)repeats, (void)out;
  return 0;
#endif
}
"""


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled ceilings. Raises BuildError where there is no C++ compiler."""
    isa = best_isa()
    vnni = ("-mavx512vnni",) if isa in ("amx", "avx512vbmi", "avx512") and "avx512_vnni" in cpu_flags() else ()
    path = build_library(SOURCE, "ceilings", flags=(*COMMON_FLAGS, *FLAGS[isa], *vnni))
    if path is None:
        raise BuildError("no C++ compiler: the machine's ceilings cannot be measured; install g++ or set BWLA_CXX")
    found = ctypes.CDLL(str(path))
    found.read_all.restype = ctypes.c_uint64
    found.float_peak.restype = found.int8_peak.restype = ctypes.c_long
    return found


def reader(array: torch.Tensor) -> Callable[[], object]:
    """Return a call that reads an array once, on the calling thread, and does nothing else."""
    read, words = library().read_all, ctypes.c_long(array.nbytes // 8)
    return lambda: read(ctypes.c_void_p(array.data_ptr()), words)


def _copier(target: torch.Tensor, array: torch.Tensor) -> Callable[[], object]:
    copy, words = library().copy_all, ctypes.c_long(array.nbytes // 8)
    return lambda: copy(ctypes.c_void_p(target.data_ptr()), ctypes.c_void_p(array.data_ptr()), words)


def _peak(name: str, repeats: int, values: torch.Tensor) -> Callable[[], object]:
    function = getattr(library(), name)
    return lambda: function(ctypes.c_long(repeats), ctypes.c_void_p(values.data_ptr()))


def _per_call(name: str, values: torch.Tensor) -> int:
    """Return how many multiply-adds a repeat makes on one thread."""
    return int(getattr(library(), name)(ctypes.c_long(1), ctypes.c_void_p(values.data_ptr())))


def measure_ceilings(threads: int) -> list[dict[str, Any]]:
    """Return a row for reading, copying (bytes read and written), and float32 and int8 multiply-adds, on threads."""
    n_bytes = cold_bytes() // threads // 8 * 8
    sources = [torch.zeros(n_bytes, dtype=torch.uint8).fill_(i + 1) for i in range(threads)]
    targets = [torch.zeros_like(source) for source in sources]
    floats = [torch.tensor([0.5, 0.25, 0.0]) for _ in range(threads)]
    words = [torch.tensor([3, 5, 0], dtype=torch.int32) for _ in range(threads)]
    calls = {
        "pure read": [reader(source) for source in sources],
        "pure copy": [_copier(target, source) for target, source in zip(targets, sources, strict=True)],
        "float32 multiply-adds": [_peak("float_peak", FLOAT_REPEATS, values) for values in floats],
        "int8 multiply-adds": [_peak("int8_peak", INT8_REPEATS, values) for values in words],
    }
    float_macs, int8_macs = _per_call("float_peak", floats[0]), _per_call("int8_peak", words[0])
    amounts = {
        "pure read": ("gb_per_second", n_bytes),
        "pure copy": ("gb_per_second", 2 * n_bytes),
        "float32 multiply-adds": ("gmac_per_second", FLOAT_REPEATS * float_macs),
        "int8 multiply-adds": ("gmac_per_second", INT8_REPEATS * int8_macs),
    }
    wanted = {name: parts for name, parts in calls.items() if amounts[name][1] > 0}
    with pinned(threads), ThreadPoolExecutor(threads) as pool:
        together = {name: [functools.partial(_together, pool, parts)] for name, parts in wanted.items()}
        times = interleaved(together, rounds=ROUNDS)
    return [
        {
            "way": name,
            "threads": threads,
            "us": round(found.median * 1e6, 1),
            "spread": round(found.spread, 3),
            amounts[name][0]: round(amounts[name][1] * threads / found.median / 1e9, 2),
        }
        for name, found in times.items()
    ]


def _together(pool: ThreadPoolExecutor, calls: list[Callable[[], object]]) -> None:
    """Make all calls at once, each on its own thread (C++ runs without Python's lock)."""
    for done in [pool.submit(call) for call in calls]:
        done.result()

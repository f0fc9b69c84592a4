"""Quantized linears against what one would use instead, shape by shape: microseconds, weight bytes a second, ratios.

Every call finds its weights cold (they rotate beyond the last cache), contenders take turns, and each result is
checked against a reference in float64 before anything is timed.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ggml import GgmlLinear, ggml
from benchmarks.timing import copies, interleaved
from bwla_compiler.codegen.build import COMMON_FLAGS, build_library
from bwla_compiler.codegen.isa import FLAGS, best_isa
from bwla_compiler.numerics.planes import BinaryWeight, unpack_signs
from bwla_compiler.runtime.halves import read_half
from bwla_compiler.runtime.modules import PackedLinear

Progress = Callable[[str, int, int], None]
Call = Callable[[], object]

SHAPES = {
    "0.6B q": (2048, 1024), "0.6B gate": (3072, 1024), "0.6B down": (1024, 3072),
    "8B q": (4096, 4096), "8B gate": (12288, 4096), "8B down": (4096, 12288),
    "32B gate": (25600, 5120), "32B down": (5120, 25600),
}  # fmt: skip
"""[out, in] of linears of Qwen3 models."""

TOKENS = (1, 4, 8, 128)
ROUNDS = 15
PEERS = ("Q1_0", "Q4_0", "BF16")

READER = r"""
#include <cstdint>
extern "C" __attribute__((visibility("default"))) uint64_t read_all(const uint64_t* from, long n) {
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
"""


@dataclass(frozen=True)
class Contender:
    """Calls on copies of one weight, and the bytes of a copy."""

    calls: Sequence[Call]
    n_bytes: int


@torch.no_grad()
def measure(progress: Progress, *, quick: bool = False) -> list[dict[str, Any]]:
    """Return a row per shape, tokens, threads and contender; quick: two shapes, one and 128 tokens."""
    shapes = dict(list(SHAPES.items())[1:4:2]) if quick else SHAPES
    cases = [
        (name, tokens, threads)
        for threads in (1, 2)
        for name in shapes
        for tokens in ((1, 128) if quick else TOKENS)
        if threads == 1 or tokens in (1, 128)
    ]
    rows, before = [], torch.get_num_threads()
    try:
        for done, (name, tokens, threads) in enumerate(cases):
            progress(f"kernels: {name}, {tokens} tokens, {threads} threads", done, len(cases))
            rows += _case(name, shapes[name], tokens, threads)
    finally:
        torch.set_num_threads(before)
    progress("kernels", len(cases), len(cases))
    return rows


def _case(name: str, shape: tuple[int, int], tokens: int, threads: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(tokens, shape[1], generator=generator)
    contenders = {f"bwla A{bits}": _packed(shape, x, bits) for bits in (8, 6, 4)}
    contenders |= {"torch bf16": _torch(weight.bfloat16(), x.bfloat16()), "torch fp32": _torch(weight, x)}
    contenders |= _peers(weight, x, threads)
    if tokens == 1:
        contenders["pure read"] = _reader(contenders["bwla A6"].n_bytes)
    times = interleaved({label: c.calls for label, c in contenders.items()}, rounds=ROUNDS)
    ours = times["bwla A6"]
    return [
        {
            "linear": name,
            "out": shape[0],
            "in": shape[1],
            "tokens": tokens,
            "threads": threads,
            "way": label,
            "us": round(times[label].median * 1e6, 1),
            "spread": round(times[label].spread, 3),
            "gb_per_second": round(c.n_bytes / times[label].median / 1e9, 2),
            "gmac_per_second": round(tokens * shape[0] * shape[1] / times[label].median / 1e9, 1),
            "times_bwla_a6": round(ours.ratio(times[label]), 2),
        }
        for label, c in contenders.items()
    ]


def _packed(shape: tuple[int, int], x: Tensor, bits: int) -> Contender:
    out, width = shape
    n_bytes = out * -(-width // 8)
    linears = [_random_linear(shape, bits, seed) for seed in range(copies(n_bytes))]
    found = _call(linears[0], x)()
    assert isinstance(found, Tensor)
    _check(found, _reference(linears[0], x, bits), f"bwla A{bits} {shape}")

    return Contender([_call(linear, x) for linear in linears], n_bytes)


def _call(linear: PackedLinear, x: Tensor) -> Call:
    """Return the operator on a linear's tensors: what compiled code calls, without the module's Python."""
    operator = torch.ops.bwla.linear.default
    scale, exponent = linear.row_scale, linear.row_scale_exponent
    return lambda: operator(x, linear.signs, scale, None, None, None, None, None, linear.activation_bits, exponent)


def _random_linear(shape: tuple[int, int], bits: int, seed: int) -> PackedLinear:
    """Return a linear of random signs and row scales."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(1, shape[0], 1, generator=generator) + 0.5
    binary = BinaryWeight(torch.ones(1, *shape, dtype=torch.int8), scale)
    linear = PackedLinear.from_binary(binary, activation_bits=bits, dtype=torch.float32)
    linear.signs.random_(0, 256, generator=generator)
    return linear


def _reference(linear: PackedLinear, x: Tensor, bits: int) -> Tensor:
    """Return the product in float64 with x rounded per token to `bits`."""
    limit, row_scale = 2 ** (bits - 1) - 1, read_half(linear, "row_scale")
    assert row_scale is not None
    weight = unpack_signs(linear.signs, linear.in_features)[0].double() * row_scale[0].double()
    scale = x.abs().amax(-1, keepdim=True) / limit
    return ((x / scale).round() * scale).double() @ weight.T


def _check(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Raise where a contender's result is wrong: a wrong kernel's time is worth nothing."""
    error = float((found.double() - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise RuntimeError(f"{what} is wrong by {error:.1e} (at most {tolerance:.0e}): not timed")


def _torch(weight: Tensor, x: Tensor) -> Contender:
    weights = [weight.clone() for _ in range(copies(weight.nbytes))]
    _check(nn.functional.linear(x, weight), x.double() @ weight.double().T, f"torch {weight.dtype}", tolerance=1e-2)
    return Contender([lambda w=w: nn.functional.linear(x, w) for w in weights], weight.nbytes)


def _peers(weight: Tensor, x: Tensor, threads: int) -> dict[str, Contender]:
    library, found = ggml(), {}
    for kind in PEERS if library is not None else ():
        assert library is not None
        if not library.has(kind):
            continue
        first = library.linear(kind, weight, len(x), threads=threads)
        linears: list[GgmlLinear] = [first]
        linears += [library.linear(kind, weight, len(x), threads=threads) for _ in range(copies(first.n_bytes) - 1)]
        for linear in linears:
            linear.x.copy_(x)
        # Weights of one bit are far from the weight itself: what is checked is that the product is one of x.
        _check(first.run(), x.double() @ weight.double().T, f"ggml {kind}", tolerance=0.9)
        found[f"ggml {kind}"] = Contender([linear.run for linear in linears], first.n_bytes)
    return found


def _reader(n_bytes: int) -> Contender:
    """Read the bytes of weights and nothing else: what memory allows on one thread."""
    flags = FLAGS[best_isa()]
    path = build_library(READER, "reader", flags=(*COMMON_FLAGS, *flags))
    if path is None:
        raise RuntimeError("no C++ compiler: the kernels cannot be measured")
    read = ctypes.CDLL(str(path)).read_all
    arrays = [torch.zeros(n_bytes, dtype=torch.uint8).fill_(i) for i in range(copies(n_bytes))]
    words = ctypes.c_long(n_bytes // 8)
    return Contender([lambda a=a: read(ctypes.c_void_p(a.data_ptr()), words) for a in arrays], n_bytes)

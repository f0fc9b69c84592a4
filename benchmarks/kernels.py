"""Quantized linears against what one would use instead, shape by shape: microseconds, weight bytes a second, ratios.

Every call finds its weights cold (they rotate beyond the last cache), contenders take turns, and each result is
checked against a reference in float64 before anything is timed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.budget import Budget
from benchmarks.ceilings import measure_ceilings, reader
from benchmarks.contest import Call, Contender, check_result, contest
from benchmarks.ggml import GgmlLinear, ggml
from benchmarks.kernel_tables import CEILING, TRANSFORM
from benchmarks.noise import Noise, pinned
from benchmarks.timing import copies
from benchmarks.transforms import transform_rows
from bwla_compiler.numerics.planes import BinaryWeight, unpack_signs
from bwla_compiler.runtime.halves import read_half
from bwla_compiler.runtime.modules import PackedLinear

Progress = Callable[[str, int, int], None]

SHAPES = {
    "0.6B q": (2048, 1024), "0.6B gate": (3072, 1024), "0.6B down": (1024, 3072),
    "8B q": (4096, 4096), "8B gate": (12288, 4096), "8B down": (4096, 12288),
    "32B gate": (25600, 5120), "32B down": (5120, 25600),
}  # fmt: skip
"""[out, in] of linears of Qwen3 models."""

ROUNDS = 15
PEERS = ("Q1_0", "Q4_0", "BF16")


@torch.no_grad()
def measure(progress: Progress, *, quick: bool = False, budget: Budget | None = None) -> list[dict[str, Any]]:
    """Return a row per shape, tokens, threads and contender, rows of transforms, and the ceilings on as many threads.

    quick: two shapes, one and 128 tokens. budget: of wall time; the cases that decide most come first.
    Raises RefusedError where a kernel's result is wrong.
    """
    rows: list[dict[str, Any]] = []
    cases = _cases(quick)
    for done, case in enumerate((budget or Budget()).within(cases)):
        noise = Noise()
        name, tokens, threads = case
        progress("kernels", done, len(cases))
        if name == CEILING:
            found = [{"linear": CEILING, **row} for row in measure_ceilings(threads)]
        elif name in SHAPES:
            found = _case(name, SHAPES[name], tokens, threads)
        else:
            found = transform_rows(int(name.split()[-1]), tokens, threads, rounds=ROUNDS)
        rows += [{**row, **noise.fields()} for row in found]
    progress("kernels", len(cases), len(cases))
    if ggml() is None:
        rows.append({"linear": "", "way": "ggml", "missing": "llama-cpp-python is not installed"})
    return rows


def _cases(quick: bool) -> list[tuple[str, int, int]]:
    """Return (linear, tokens, threads), or a transform's or the ceilings' name in place of the linear."""
    shapes = list(SHAPES)[1:4:2] if quick else list(SHAPES)
    widths = (3072,) if quick else (1024, 3072, 4096, 12288)
    cases = []
    for threads in (1, 2):
        cases.append((CEILING, 0, threads))
        for tokens in (1, 128) if quick or threads > 1 else (1, 128, 4, 8):
            cases += [(name, tokens, threads) for name in shapes]
            if tokens in (1, 128):
                cases += [(f"{TRANSFORM} {width}", tokens, threads) for width in widths]
    return cases


def _case(name: str, shape: tuple[int, int], tokens: int, threads: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(tokens, shape[1], generator=generator)
    with pinned(threads):
        contenders = {f"bwla A{bits}": _packed(shape, x, bits) for bits in (8, 6, 4)}
        contenders |= {"torch bf16": _torch(weight.bfloat16(), x.bfloat16()), "torch fp32": _torch(weight, x)}
        contenders |= _peers(weight, x, threads)
        if tokens == 1:
            contenders["pure read"] = _reader(contenders["bwla A6"].n_bytes)
        rows = contest(contenders, ours="bwla A6", macs=tokens * shape[0] * shape[1], rounds=ROUNDS)
    about = {"linear": name, "out": shape[0], "in": shape[1], "tokens": tokens, "threads": threads}
    return [{**about, **row} for row in rows]


def _packed(shape: tuple[int, int], x: Tensor, bits: int) -> Contender:
    out, width = shape
    n_bytes = out * -(-width // 8)
    linears = [_random_linear(shape, bits, seed) for seed in range(copies(n_bytes))]
    found = _call(linears[0], x)()
    assert isinstance(found, Tensor)
    check_result(found, _reference(linears[0], x, bits), f"bwla A{bits} {shape}")

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
    product: Tensor = ((x / scale).round() * scale).double() @ weight.T
    return product


def _torch(weight: Tensor, x: Tensor) -> Contender:
    weights = [weight.clone() for _ in range(copies(weight.nbytes))]
    check_result(
        nn.functional.linear(x, weight), x.double() @ weight.double().T, f"torch {weight.dtype}", tolerance=1e-2
    )
    return Contender([partial(nn.functional.linear, x, w) for w in weights], weight.nbytes)


def _peers(weight: Tensor, x: Tensor, threads: int) -> dict[str, Contender]:
    library, found = ggml(), {}
    for kind in PEERS if library is not None else ():
        assert library is not None
        if not library.has(kind) or not library.fits(kind, weight.shape[1]):
            continue
        first = library.linear(kind, weight, len(x), threads=threads)
        linears: list[GgmlLinear] = [first]
        linears += [library.linear(kind, weight, len(x), threads=threads) for _ in range(copies(first.n_bytes) - 1)]
        for linear in linears:
            linear.x.copy_(x)
        # Weights of one bit are far from the weight itself: what is checked is that the product is one of x.
        check_result(first.run(), x.double() @ weight.double().T, f"ggml {kind}", tolerance=0.9)
        found[f"ggml {kind}"] = Contender([linear.run for linear in linears], first.n_bytes)
    return found


def _reader(n_bytes: int) -> Contender:
    """Read the bytes of weights and nothing else: what memory allows on one thread."""
    arrays = [torch.full((n_bytes,), i % 256, dtype=torch.uint8) for i in range(copies(n_bytes))]
    return Contender([reader(array) for array in arrays], n_bytes)

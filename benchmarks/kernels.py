"""Quantized linears against what one would use instead, shape by shape: microseconds, weight bytes a second, ratios.

Every call finds its weights cold (they rotate beyond the last cache), contenders take turns, and each result is
checked against a reference in float64 before anything is timed.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.budget import LEFT_OUT, Budget
from benchmarks.ceilings import measure_ceilings, reader
from benchmarks.contest import Call, Contender, check_result, contest
from benchmarks.errors import RefusedError, ResultsError
from benchmarks.kernel_peers import PEERS, SHORT, Product, release
from benchmarks.kernel_tables import CEILING, PROLOGUE, TRANSFORM
from benchmarks.noise import Noise, pinned
from benchmarks.prologues import SERVED, prologue_rows
from benchmarks.random_linear import random_linear
from benchmarks.timing import copies
from benchmarks.transforms import transform_rows
from bwla_compiler.numerics.planes import unpack_signs
from bwla_compiler.runtime.halves import read_half
from bwla_compiler.runtime.modules import PackedLinear

Progress = Callable[[str, int, int], None]
Row = dict[str, Any]
Case = tuple[str, int, int]
"""(linear, tokens, threads); in place of the linear the name of a transform, a linear's prologue or the ceilings."""

SHAPES = {
    "0.6B q": (2048, 1024), "0.6B gate": (3072, 1024), "0.6B down": (1024, 3072),
    "8B q": (4096, 4096), "8B gate": (12288, 4096), "8B down": (4096, 12288),
    "32B gate": (25600, 5120), "32B down": (5120, 25600),
}  # fmt: skip
"""[out, in] of linears of Qwen3 models."""

WIDTHS = (1024, 3072, 4096, 12288)
"""Channels of the transforms."""

FIRST_SHAPES, FIRST_TOKENS = ("0.6B gate", "8B gate", "32B gate"), (1, 128)
"""What decides, and is measured before the rest: a linear of each size of model, decoding and reading a prompt."""

TOKENS, THREADS = (1, 128, 8, 4), (1, 2)
ROUNDS = 15


@torch.no_grad()
def measure(
    progress: Progress,
    *,
    shapes: Sequence[str] = (),
    tokens: Sequence[int] = (),
    threads: Sequence[int] = (),
    peers: Sequence[str] = tuple(PEERS),
    budget: Budget | None = None,
    keep: Callable[[list[Row]], object] | None = None,
) -> list[Row]:
    """Return a row per shape, tokens, threads and contender, rows of transforms, and the ceilings on as many threads.

    shapes, tokens, threads: these alone; a shape is a name of SHAPES, "transform of N" or
    "prologue of" one of SERVED, which is measured at one token alone. peers: by name. budget: of
    wall time; the cases that decide most come first. keep: gets the rows of each case as soon as they are there, and
    those without figures at the end. Rows with "missing" say which peers and cases have no figures.
    Raises ResultsError for an unknown name, RefusedError where a kernel's result is wrong.
    """
    chosen = _cases(shapes, tokens, threads)
    if unknown := set(peers) - set(PEERS):
        raise ResultsError(f"no peer is called {sorted(unknown)[0]!r}; there are: {', '.join(PEERS)}")
    here = {name: PEERS[name].missing() for name in peers}
    rows: list[Row] = [{"linear": "", "way": name, "missing": why} for name, why in here.items() if why]
    if tuple(peers) == SHORT:
        rows += [{"linear": "", "way": name, "missing": "not in a short run"} for name in PEERS if name not in peers]
    wanted, left = [name for name, why in here.items() if not why], budget or Budget()
    for done, case in enumerate(left.within(chosen, like=lambda case: case[:2])):
        noise = Noise()
        progress("kernels", done, len(chosen))
        found = [{**row, **noise.fields()} for row in _measured(case, wanted)]
        rows += found
        if keep is not None:
            keep(found)
    progress("kernels", len(chosen), len(chosen))
    absent = [
        {"linear": name, "way": "", "tokens": m, "threads": n, "missing": LEFT_OUT} for name, m, n in left.left_out
    ]
    if keep is not None and (without := [row for row in rows if "missing" in row] + absent):
        keep(without)
    return rows + absent


def _cases(shapes: Sequence[str], tokens: Sequence[int], threads: Sequence[int]) -> list[Case]:
    """Return the cases in their order: ceilings, what decides, transforms, other shapes, other numbers of tokens."""
    known = [*SHAPES, *(f"{TRANSFORM} {width}" for width in WIDTHS), *(f"{PROLOGUE} {name}" for name in SERVED)]
    for name in shapes:
        if name not in known:
            raise ResultsError(f"no shape is called {name!r}; there are: {', '.join(known)}")
    cases = [
        (name, m, n)
        for n in threads or THREADS
        for m in tokens or TOKENS
        for name in shapes or known
        if (tokens or m in FIRST_TOKENS or (n == 1 and name in SHAPES)) and (m == 1 or not name.startswith(PROLOGUE))
    ]
    return [*((CEILING, 0, n) for n in threads or THREADS), *sorted(cases, key=_rank)]


def _rank(case: Case) -> int:
    name, tokens, _ = case
    if tokens not in FIRST_TOKENS:
        return 3
    return 0 if name in FIRST_SHAPES else 1 if name not in SHAPES else 2


def _measured(case: Case, peers: Sequence[str]) -> list[Row]:
    name, tokens, threads = case
    if name == CEILING:
        return [{"linear": CEILING, **row} for row in measure_ceilings(threads)]
    if name in SHAPES:
        return _case(name, SHAPES[name], tokens=tokens, threads=threads, peers=peers)
    if name.startswith(PROLOGUE):
        return prologue_rows(name.removeprefix(f"{PROLOGUE} "), threads)
    return transform_rows(int(name.split()[-1]), tokens, threads, rounds=ROUNDS)


def _case(name: str, shape: tuple[int, int], *, tokens: int, threads: int, peers: Sequence[str]) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(tokens, shape[1], generator=generator)
    about = {"linear": name, "out": shape[0], "in": shape[1], "tokens": tokens, "threads": threads}
    with pinned(threads):
        contenders = {f"bwla A{bits}": _packed(shape, x, bits) for bits in (8, 6, 4)}
        product = Product(weight, x, x.double() @ weight.double().T, threads)
        rows: list[Row] = []
        for peer in peers:
            try:
                contenders[peer] = PEERS[peer].make(product)
            except RefusedError as error:
                rows.append({"way": peer, "refused": str(error)})
            except Exception as error:  # of whatever kind: a peer that fails takes no other one's figures away
                rows.append({"way": peer, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
        if tokens == 1:
            contenders["pure read"] = _reader(contenders["bwla A6"].n_bytes)
        rows += contest(contenders, ours="bwla A6", macs=tokens * shape[0] * shape[1], rounds=ROUNDS)
        contenders.clear()
        release()
    return [{**about, **row} for row in rows]


def _packed(shape: tuple[int, int], x: Tensor, bits: int) -> Contender:
    out, width = shape
    n_bytes = out * -(-width // 8)
    first = random_linear(shape, bits)
    found = _call(first, x)()
    assert isinstance(found, Tensor)
    check_result(found, _reference(first, x, bits), f"bwla A{bits} {shape}")
    linears = [first, *(deepcopy(first) for _ in range(copies(n_bytes) - 1))]
    return Contender([_call(linear, x) for linear in linears], n_bytes)


def _call(linear: PackedLinear, x: Tensor) -> Call:
    """Return the operator on a linear's tensors: what compiled code calls, without the module's Python."""
    scale, exponent = linear.row_scale, linear.row_scale_exponent
    operands = (x, linear.signs, scale, None, None, None, None, None, linear.activation_bits, exponent)
    return partial(torch.ops.bwla.linear.default, *operands)


def _reference(linear: PackedLinear, x: Tensor, bits: int) -> Tensor:
    """Return the product in float64 with x rounded per token to `bits`."""
    limit, row_scale = 2 ** (bits - 1) - 1, read_half(linear, "row_scale")
    assert row_scale is not None
    weight = unpack_signs(linear.signs, linear.in_features)[0].double() * row_scale[0].double()
    scale = x.abs().amax(-1, keepdim=True) / limit
    product: Tensor = ((x / scale).round() * scale).double() @ weight.T
    return product


def _reader(n_bytes: int) -> Contender:
    """Read the bytes of weights and nothing else: what memory allows on one thread."""
    arrays = [torch.full((n_bytes,), i % 256, dtype=torch.uint8) for i in range(copies(n_bytes))]
    return Contender([reader(array) for array in arrays], n_bytes)

"""What a linear waits for at one token, its online transform and rounding, as a share of the linear itself.

Contenders take turns: fused calls with the transform, calls without it, which round as well, the latter once more, and
rounding alone. All find weights and factors cold, as in a model, where each layer has its own. Their copies lie in
turn too: of two contenders that do the same, the one whose copies came first was a microsecond slower, as much as a
transform takes. What the same two differ by is told. Calls go to the kernels themselves, as those of a compiled
model's routines do, whose operands are bound once.
"""

import ctypes
import mmap
import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Call, check_result
from benchmarks.errors import ResultsError
from benchmarks.kernel_tables import PROLOGUE
from benchmarks.noise import pinned
from benchmarks.random_linear import random_linear, random_transform
from benchmarks.timing import Times, copies, interleaved, quartiles
from bwla_compiler.codegen.library import LEFT, RIGHT, SCALE, SIGNS, KernelLibrary, Member, Prologue, best_library
from bwla_compiler.cost.factors import hadamard_factors
from bwla_compiler.numerics.planes import unpack_signs
from bwla_compiler.runtime.halves import read_half
from bwla_compiler.runtime.modules import PackedLinear
from bwla_compiler.runtime.online import OnlineTransform

BITS = 6
LIMIT = 2 ** (BITS - 1) - 1
TOLERANCE = 1e-2
"""Relative. A float that lies between two codes may be rounded to the other one than in float64: of 10^4 codes some."""

ROUNDS = 100
"""A difference of two that are much longer needs more of them than what is timed by itself."""

ROUNDED_AT_ONCE, ROUNDINGS = 16, 16
"""Tokens of a call that rounds and does nothing else, and such calls in a row: what a call costs from Python counts for
little, and the tokens lie in the caches, as one does that has just been transformed."""


@dataclass(frozen=True)
class Served:
    """A linear of a model [out, in] and the heads that its transform goes across; 0: two factors turn all channels."""

    shape: tuple[int, int]
    heads: int = 0


SERVED = {
    "0.6B o": Served((1024, 2048), 16), "0.6B down": Served((1024, 3072)),
    "8B o": Served((4096, 4096), 32), "8B down": Served((4096, 12288)),
    "32B o": Served((5120, 8192), 64), "32B down": Served((5120, 25600)),
}  # fmt: skip
"""Linears of Qwen3 models whose inputs are transformed online: an o turns across heads, whose own turns are folded."""


def prologue_rows(name: str, threads: int, *, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Return the row of one of SERVED at one token: microseconds of its transform and rounding, and their share of it.

    Raises ResultsError without a C++ compiler, RefusedError where a result is wrong.
    """
    served, library = SERVED[name], best_library()
    if library is None:
        raise ResultsError("transforms and rounding are timed in the compiled kernels, and there is no C++ compiler")
    x = torch.randn(1, served.shape[1], generator=torch.Generator().manual_seed(0))
    linear, transform, memory = random_linear(served.shape, BITS), _transform(served), _Memory()

    def call(before: OnlineTransform | None) -> _Fused:
        return _Fused(library, linear, before, x, threads, memory)

    check_result(call(transform)(), _reference(linear, transform, x), f"{PROLOGUE} {name}", tolerance=TOLERANCE)
    transforms = {"whole": transform, "without": None, "again": None}
    contenders: dict[str, list[Call]] = {way: [] for way in transforms}
    for _ in range(copies(linear.signs.nbytes)):
        for way, calls in contenders.items():
            calls.append(call(transforms[way]))
    contenders["rounding"] = [_rounding(library, x)] * ROUNDINGS
    with pinned(threads):
        times = interleaved(contenders, rounds=rounds)
    about = {"linear": f"{PROLOGUE} {name}", "out": served.shape[0], "in": served.shape[1], "tokens": 1}
    return [{**about, "threads": threads, "way": "transform and rounding", **_shares(times)}]


def _shares(times: dict[str, Times]) -> dict[str, Any]:
    """Return figures of what precedes the linear, taken round by round."""
    rounding = times["rounding"].over(ROUNDED_AT_ONCE)
    rows = list(zip(*(times[way].seconds for way in ("whole", "without", "again")), rounding.seconds, strict=True))
    before = [whole - (without + again) / 2 + rounded for whole, without, again, rounded in rows]
    linear = [(without + again) / 2 - rounded for _, without, again, rounded in rows]
    shares = [a / b for a, b in zip(before, linear, strict=True)]
    low, high = quartiles(shares)
    return {
        "us": round(statistics.median(before) * 1e6, 2),
        "rounding_us": round(rounding.median * 1e6, 2),
        "linear_us": round(statistics.median(linear) * 1e6, 1),
        "control_us": round(statistics.median(again - without for _, without, again, _ in rows) * 1e6, 2),
        "share": round(statistics.median(shares), 4),
        "share_low": round(low, 4),
        "share_high": round(high, 4),
    }


def _transform(served: Served) -> OnlineTransform:
    """Return a transform as the default recipe has it: across heads, or a left factor beside a Hadamard matrix."""
    generator, width = torch.Generator().manual_seed(1), served.shape[1]
    if served.heads:
        return random_transform(served.heads, width // served.heads, generator, right="none")
    sizes = hadamard_factors(width)
    assert sizes is not None
    return random_transform(*sizes, generator, right="hadamard")


class _Memory:
    """Memory for what calls read, of huge pages where the system has them, as operators keep what they read."""

    BLOCK = 16 << 20

    def __init__(self) -> None:
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def like(self, values: Tensor) -> Tensor:
        """Return a copy of values from a cache line on."""
        n_bytes = values.nbytes
        if self._used + n_bytes > len(self._block):
            pages = mmap.mmap(-1, max(self.BLOCK, n_bytes))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            self._block, self._used = torch.frombuffer(pages, dtype=torch.uint8), 0
        copy = self._block[self._used : self._used + n_bytes].view(values.dtype).view(values.shape)
        self._used += -(-n_bytes // 64) * 64
        return copy.copy_(values)


class _Fused:
    """One linear with what precedes it, of its own memory; a call computes y [1, out] and returns it."""

    def __init__(
        self,
        library: KernelLibrary,
        linear: PackedLinear,
        before: OnlineTransform | None,
        x: Tensor,
        threads: int,
        memory: _Memory,
    ) -> None:
        (columns, out), y = (linear.in_features, linear.out_features), torch.empty(1, linear.out_features)
        signs = torch.empty(library.packed_bytes(1, out, columns), dtype=torch.uint8)
        library.pack(linear.signs.data_ptr(), signs.data_ptr(), 1, out, columns, 1)
        scale = read_half(linear, "row_scale")
        assert scale is not None
        signs, scale = memory.like(signs), memory.like(scale)
        member = Member(signs.data_ptr(), scale.data_ptr(), 0, 0, 0, 0, y.data_ptr(), out, 1, 1, 0, 0)
        packed = () if before is None else _packed_factors(library, before)
        factors = [None if factor is None else memory.like(factor) for factor in packed]
        prologue = Prologue()
        if before is not None:
            places = (0 if factor is None else factor.data_ptr() for factor in factors)
            prologue = Prologue(0, 0.0, 0, 0, 0, *places, before.spec.n1, before.spec.n2)
        self._read = x, signs, scale, factors, member, prologue  # kernels know their addresses alone
        self._y = y
        given = 0 if before is None else ctypes.addressof(prologue)
        self._run = partial(library.fused_group, x.data_ptr(), given, 0, 1, columns, LIMIT, member, 1, threads)

    def __call__(self) -> Tensor:
        self._run()
        return self._y


def _packed_factors(library: KernelLibrary, transform: OnlineTransform) -> tuple[Tensor | None, ...]:
    """Return (scale, left, right) of a transform as kernels read them."""
    scale, left, right = (read_half(transform, name) for name in ("scale", "left", "right"))

    def packed(factor: Tensor | None, side: int) -> Tensor | None:
        if factor is None:
            return None
        own, factor = torch.empty(library.packed_factor(len(factor), side)), factor.contiguous()
        library.pack_factor(factor.data_ptr(), own.data_ptr(), len(factor), side)
        return own

    return packed(scale, SCALE), packed(left, LEFT), packed(right, SIGNS if transform.spec.signed else RIGHT)


def _rounding(library: KernelLibrary, x: Tensor) -> Call:
    rows = x.repeat(ROUNDED_AT_ONCE, 1)
    codes, scale = torch.empty(rows.shape, dtype=torch.int8), torch.empty(ROUNDED_AT_ONCE)
    return partial(_quantize, library.quantize, rows, codes, scale)


def _quantize(entry: Any, rows: Tensor, codes: Tensor, scale: Tensor) -> None:
    entry(rows.data_ptr(), 0, *rows.shape, LIMIT, codes.data_ptr(), scale.data_ptr())


def _reference(linear: PackedLinear, transform: OnlineTransform, x: Tensor) -> Tensor:
    """Return the product in float64 with x turned and rounded."""
    scale, left, right = (None if f is None else f.double() for f in transform.factors())
    assert scale is not None
    assert left is not None
    turned = (x.double() * scale).view(len(left), -1)
    turned = left.T @ turned if right is None else left.T @ turned @ right
    turned = turned.view(1, -1)
    row_scale = read_half(linear, "row_scale")
    assert row_scale is not None
    weight = unpack_signs(linear.signs, linear.in_features)[0].double() * row_scale[0].double()
    step = turned.abs().amax() / LIMIT
    product: Tensor = (turned / step).round() * step @ weight.T
    return product

"""What a linear waits for at one token, its online transform and rounding, as a share of the linear itself.

Three contenders take turns: fused calls with the transform, calls without it, which round as well, and rounding alone.
All find weights and factors cold, as in a model, where each layer has its own.
"""

import statistics
from copy import deepcopy
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
from bwla_compiler.codegen.library import best_library
from bwla_compiler.cost.factors import hadamard_factors
from bwla_compiler.numerics.planes import unpack_signs
from bwla_compiler.runtime.halves import read_half
from bwla_compiler.runtime.modules import PackedLinear
from bwla_compiler.runtime.online import OnlineTransform

BITS = 6
TOLERANCE = 1e-2
"""Relative. A float that lies between two codes may be rounded to the other one than in float64: of 10^4 codes some."""

ROUNDED_AT_ONCE = 64
"""Tokens of a call that rounds and does nothing else: what the call costs from Python counts for little."""


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


def prologue_rows(name: str, threads: int, *, rounds: int) -> list[dict[str, Any]]:
    """Return the row of one of SERVED at one token: microseconds of its transform and rounding, and their share of it.

    Raises ResultsError without a C++ compiler, RefusedError where a result is wrong.
    """
    served = SERVED[name]
    x = torch.randn(1, served.shape[1], generator=torch.Generator().manual_seed(0))
    linear, transform = random_linear(served.shape, BITS), _transform(served)
    found = _call(linear, transform, x)()
    assert isinstance(found, Tensor)
    check_result(found, _reference(linear, transform, x), f"{PROLOGUE} {name}", tolerance=TOLERANCE)
    n = copies(linear.signs.nbytes)
    linears = [linear, *(deepcopy(linear) for _ in range(n - 1))]
    transforms = [transform, *(deepcopy(transform) for _ in range(n - 1))]
    with pinned(threads):
        times = interleaved(
            {
                "whole": [_call(linear, own, x) for linear, own in zip(linears, transforms, strict=True)],
                # as many calls apart from those above as a turn can make
                "without": [_call(linear, None, x) for linear in (*linears[n // 2 :], *linears[: n // 2])],
                "rounding": [_rounding(x)],
            },
            rounds=rounds,
        )
    about = {"linear": f"{PROLOGUE} {name}", "out": served.shape[0], "in": served.shape[1], "tokens": 1}
    return [{**about, "threads": threads, "way": "transform and rounding", **_shares(times)}]


def _shares(times: dict[str, Times]) -> dict[str, Any]:
    """Return figures of what precedes the linear, taken round by round."""
    rounding = times["rounding"].over(ROUNDED_AT_ONCE)
    rows = list(zip(times["whole"].seconds, times["without"].seconds, rounding.seconds, strict=True))
    before = [whole - without + rounded for whole, without, rounded in rows]
    linear = [without - rounded for _, without, rounded in rows]
    shares = [a / b for a, b in zip(before, linear, strict=True)]
    low, high = quartiles(shares)
    return {
        "us": round(statistics.median(before) * 1e6, 2),
        "rounding_us": round(rounding.median * 1e6, 2),
        "linear_us": round(statistics.median(linear) * 1e6, 1),
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


def _call(linear: PackedLinear, transform: OnlineTransform | None, x: Tensor) -> Call:
    """Return the fused operator on one linear's tensors: what a compiled model's routine computes."""
    factors: tuple[Tensor | None, ...] = (None,) * 6
    if transform is not None:
        stored = dict(transform.named_buffers())
        names = ("scale", "left", "right")
        factors = (*(stored.get(name) for name in names), *(stored.get(f"{name}_exponent") for name in names))
    none = [None]
    before = (x, None, "none", 0.0, None, None, *factors)
    linears = ([linear.signs], [linear.row_scale], None, none, none, none, none, none, BITS)
    operands = (*before, *linears, [linear.row_scale_exponent], None, none)
    return lambda: torch.ops.bwla.fused_group.default(*operands)[0]


def _rounding(x: Tensor) -> Call:
    library = best_library()
    if library is None:
        raise ResultsError("rounding alone is timed in the compiled kernels, and there is no C++ compiler")
    rows = x.repeat(ROUNDED_AT_ONCE, 1)
    codes, scale = torch.empty(rows.shape, dtype=torch.int8), torch.empty(ROUNDED_AT_ONCE)
    limit = 2 ** (BITS - 1) - 1
    return partial(_quantize, library.quantize, rows, codes, scale, limit)


def _quantize(entry: Any, rows: Tensor, codes: Tensor, scale: Tensor, limit: int) -> None:
    entry(rows.data_ptr(), 0, *rows.shape, limit, codes.data_ptr(), scale.data_ptr())


def _reference(linear: PackedLinear, transform: OnlineTransform, x: Tensor) -> Tensor:
    """Return the product in float64 with x turned and rounded."""
    scale, left, right = (None if f is None else f.double() for f in transform.factors())
    assert scale is not None
    assert left is not None
    turned = (x.double() * scale).view(len(left), -1)
    turned = left.T @ turned if right is None else left.T @ turned @ right
    turned = turned.view(1, -1)
    row_scale, limit = read_half(linear, "row_scale"), 2 ** (BITS - 1) - 1
    assert row_scale is not None
    weight = unpack_signs(linear.signs, linear.in_features)[0].double() * row_scale[0].double()
    step = turned.abs().amax() / limit
    product: Tensor = (turned / step).round() * step @ weight.T
    return product

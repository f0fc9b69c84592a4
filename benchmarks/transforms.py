"""Changes of basis that are computed at run time, against a dense rotation of the same width."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Contender, check_result, contest
from benchmarks.noise import pinned
from benchmarks.timing import copies
from bwla_compiler.cost.factors import kronecker_factors
from bwla_compiler.runtime.online import OnlineTransform

TOLERANCE = 1e-5
"""Factors are stored in float16 and the reference reads them so: what is left is float32's summation."""


def transform_rows(width: int, tokens: int, threads: int, *, rounds: int) -> list[dict[str, Any]]:
    """Return a row for our Kronecker transform and for torch's dense float32 product, of `width` channels.

    Raises RefusedError where the transform's result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    n1, n2 = kronecker_factors(width)
    x = torch.randn(tokens, width, generator=generator)
    transform = _kronecker(n1, n2, generator)
    check_result(transform(x), _reference(transform, x), f"bwla Kronecker {n1} x {n2}", tolerance=TOLERANCE)
    with pinned(threads):
        rows = contest(
            {
                "bwla Kronecker": _ours(n1, n2, x, generator),
                "torch dense fp32": _dense(width, x, generator),
            },
            ours="bwla Kronecker",
            macs=tokens * width * (n1 + n2),
            rounds=rounds,
        )
    about = {"linear": f"transform of {width}", "out": width, "in": width, "tokens": tokens, "threads": threads}
    return [{**about, **row} for row in rows]


def _kronecker(n1: int, n2: int, generator: torch.Generator) -> OnlineTransform:
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (n1, n2))
    return OnlineTransform.from_factors(torch.ones(n1 * n2), left, right, kind="kronecker")


def _reference(transform: OnlineTransform, x: Tensor) -> Tensor:
    """Return left^T X right of each token in float64."""
    scale, left, right = (factor.double() for factor in transform.factors() if factor is not None)
    blocks = (x.double() * scale).view(len(x), len(left), len(right))
    return (left.T @ blocks @ right).flatten(1)


def _ours(n1: int, n2: int, x: Tensor, generator: torch.Generator) -> Contender:
    first = _kronecker(n1, n2, generator)
    n_bytes = sum(buffer.nbytes for buffer in first.buffers())
    # Factors are read by every layer that shares them and stay warm in a model too: a handful of copies is enough.
    transforms = [first, *(_kronecker(n1, n2, generator) for _ in range(7))]
    return Contender([partial(transform, x) for transform in transforms], n_bytes)


def _dense(width: int, x: Tensor, generator: torch.Generator) -> Contender:
    first = torch.randn(width, width, generator=generator) / width**0.5
    matrices = [first.clone() for _ in range(copies(first.nbytes))]
    return Contender([partial(torch.matmul, x, matrix) for matrix in matrices], first.nbytes)

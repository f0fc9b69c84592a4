"""Changes of basis that are computed at run time, against a dense rotation of the same width."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Contender, check_result, contest
from benchmarks.noise import pinned
from benchmarks.random_linear import random_transform
from benchmarks.timing import copies
from bwla_compiler.cost.factors import hadamard_factors, kronecker_factors
from bwla_compiler.runtime.online import OnlineTransform

TOLERANCE = 1e-5
"""Factors are stored in float16 and the reference reads them so: what is left is float32's summation."""


def transform_rows(width: int, tokens: int, threads: int, *, rounds: int) -> list[dict[str, Any]]:
    """Return a row for our Kronecker transforms and for torch's dense float32 product, of `width` channels.

    Ours are of two fitted factors, and of one beside a Hadamard matrix, as the default recipe has it, where the width
    has one. Raises RefusedError where a result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    n1, n2 = kronecker_factors(width)
    x = torch.randn(tokens, width, generator=generator)
    ours = {"bwla Kronecker": random_transform(n1, n2, generator)}
    if sizes := hadamard_factors(width):
        ours["bwla Kronecker, Hadamard"] = random_transform(*sizes, generator, right="hadamard")
    for way, transform in ours.items():
        check_result(transform(x), _reference(transform, x), f"{way} of {width}", tolerance=TOLERANCE)
    with pinned(threads):
        rows = contest(
            {
                **{way: _ours(transform, x) for way, transform in ours.items()},
                "torch dense fp32": _dense(width, x, generator),
            },
            ours="bwla Kronecker",
            macs=tokens * width * (n1 + n2),
            rounds=rounds,
        )
    about = {"linear": f"transform of {width}", "out": width, "in": width, "tokens": tokens, "threads": threads}
    return [{**about, **row} for row in rows]


def _reference(transform: OnlineTransform, x: Tensor) -> Tensor:
    """Return left^T X right of each token in float64."""
    scale, left, right = (factor.double() for factor in transform.factors() if factor is not None)
    blocks = (x.double() * scale).view(len(x), len(left), len(right))
    return (left.T @ blocks @ right).flatten(1)


def _ours(transform: OnlineTransform, x: Tensor) -> Contender:
    n_bytes = sum(buffer.nbytes for buffer in transform.buffers())
    # Factors are read by every layer that shares them and stay warm in a model too: a handful of copies is enough.
    transforms = [transform, *(deepcopy(transform) for _ in range(7))]
    return Contender([partial(own, x) for own in transforms], n_bytes)


def _dense(width: int, x: Tensor, generator: torch.Generator) -> Contender:
    first = torch.randn(width, width, generator=generator) / width**0.5
    matrices = [first.clone() for _ in range(copies(first.nbytes))]
    return Contender([partial(torch.matmul, x, matrix) for matrix in matrices], first.nbytes)

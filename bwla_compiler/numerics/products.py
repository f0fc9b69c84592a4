"""Products of float32 matrices with factors rounded to bfloat16, where the processor has units for these.

Sums stay float32; a factor is off by 2^-9 of itself at most. That is far below what a step of stochastic gradient
descent is off by, and several times as fast. Nothing that is solved or descended exactly may run so.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""Processor's capabilities, as torch names them, with which products of bfloat16 are faster than those of float32."""


def native_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 faster than float32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in NATIVE_BFLOAT16)


@contextmanager
def bfloat16_products(*, wanted: bool = True) -> Iterator[None]:
    """Round the factors of the CPU's float32 products to bfloat16 where it is wanted and native to the processor.

    The switch is torch's own, of the whole process; it is put back afterwards.
    """
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    try:
        if wanted and native_bfloat16():
            switch.fp32_precision = "bf16"
        yield
    finally:
        switch.fp32_precision = before

"""A failed allocation is told with what was being done, how much was asked for, and what helps."""

from functools import partial

import pytest
import torch

from bwla_compiler.errors import OutOfMemory
from bwla_compiler.memory import memory_bytes, told_of_shortage


def test_the_machine_has_some() -> None:
    assert memory_bytes() > 1 << 28


def test_torchs_and_pythons_failures_are_one_error() -> None:
    told = partial(told_of_shortage, "the job", remedy="use less")
    with pytest.raises(OutOfMemory, match=r"the job: out of memory \(asked for \d+ bytes\); use less"), told():
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(OutOfMemory, match="the job: out of memory; use less"), told():
        raise MemoryError
    with pytest.raises(OutOfMemory, match=r"asked for 20\.00 GiB"), told():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="something else"), told_of_shortage("the job", remedy="use less"):
        raise RuntimeError("something else")

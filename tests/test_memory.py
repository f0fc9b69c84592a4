"""A failed allocation is told with what was being done, how much was asked for, and what helps."""

import errno
from functools import partial
from pathlib import Path

import pytest
import torch

from bwla_compiler import memory
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
    with pytest.raises(OutOfMemory, match="asked for 385894736 bytes"), told():
        raise RuntimeError("unable to mmap 385894736 bytes from file <a.safetensors>: Cannot allocate memory (12)")
    with pytest.raises(OutOfMemory, match="the job: out of memory; use less"), told():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    with pytest.raises(OutOfMemory, match=r"asked for 20\.00 GiB"), told():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="something else"), told_of_shortage("the job", remedy="use less"):
        raise RuntimeError("something else")
    with pytest.raises(OSError, match="No space"), told_of_shortage("the job", remedy="use less"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_limit_counts_where_it_is_a_number_and_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "absent", path))
    path.write_text("max\n")
    whole = memory.memory_bytes()
    assert whole > 1 << 27
    path.write_text("1000000\n")
    assert memory.memory_bytes() == 1_000_000
    path.write_text(str(1 << 62))
    assert memory.memory_bytes() == whole

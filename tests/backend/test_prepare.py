"""Buffers that stand for stored tensors on a GPU: an edit of what is stored writes them anew, and nothing else does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bwla_compiler.backend.prepare import Prepared, _Kept, _Source

SIZE = 1 << 20
"""So large that the allocator gives the memory back, and takes the same address anew."""


def in_place(stored: Tensor) -> None:
    stored.mul_(3)


def by_data(stored: Tensor) -> None:
    stored.data = torch.full_like(stored, 5.0)


def by_data_twice(stored: Tensor) -> None:
    for value in (6.0, 7.0):
        stored.data = torch.full_like(stored, value)


@pytest.mark.parametrize("edit", [in_place, by_data, by_data_twice])
def test_an_edit_writes_the_buffer_anew(edit: Callable[[Tensor], None]) -> None:
    stored, made = torch.ones(SIZE), []

    def double(x: Tensor) -> Tensor:
        made.append(1)
        return 2 * x

    prepared, buffer = Prepared(), 2 * stored
    prepared.add(_Kept((_Source(0),), double, buffer), (stored,))
    prepared.renew((stored,))
    assert not made
    for _ in range(2):
        edit(stored)
        prepared.renew((stored,))
        assert torch.equal(buffer, 2 * stored)
    assert len(made) == 2


def test_another_part_of_the_same_memory_is_seen() -> None:
    stored = torch.arange(8.0)
    stored.data = stored.data[:4]
    prepared, buffer = Prepared(), 2 * stored
    prepared.add(_Kept((_Source(None, stored),), lambda x: 2 * x, buffer), ())
    stored.data = torch.as_strided(stored, (4,), (1,), 4)
    prepared.renew(())
    assert torch.equal(buffer, 2 * torch.arange(4.0, 8.0))

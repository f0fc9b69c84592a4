"""The cache of derived values: kept while nothing changed, never stale."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bwla_compiler.runtime.derived import Derived
from bwla_compiler.runtime.halves import decoded
from bwla_compiler.runtime.seen import Seen


def counted(tensor: Tensor) -> tuple[Callable[[], float], list[int]]:
    calls: list[int] = []

    def make() -> float:
        calls.append(1)
        return float(tensor.sum())

    return make, calls


def test_made_once_and_again_after_an_edit() -> None:
    cache: Derived[float] = Derived("sum")
    x = torch.ones(3)
    make, calls = counted(x)
    assert cache.get(x, make) == 3
    assert cache.get(x, make) == 3
    assert len(calls) == 1
    x.mul_(2)
    assert cache.get(x, make) == 6
    assert len(calls) == 2


def test_the_tensor_beside_counts() -> None:
    cache: Derived[float] = Derived("sum")
    x, beside = torch.ones(3), torch.zeros(())
    make, calls = counted(x)
    cache.get(x, make, beside=beside)
    beside.add_(1)
    cache.get(x, make, beside=beside)
    assert len(calls) == 2


def test_new_storage_under_the_same_tensor_is_seen() -> None:
    cache: Derived[float] = Derived("sum")
    x = torch.ones(3)
    make, _ = counted(x)
    cache.get(x, make)
    x.data = torch.full((3,), 5.0)
    assert cache.get(x, make) == 15


def test_unseen_edit_needs_forget() -> None:
    cache: Derived[float] = Derived("sum")
    x = torch.ones(3)
    make, _ = counted(x)
    cache.get(x, make)
    x.data.mul_(2)
    cache.forget(x)
    assert cache.get(x, make) == 6


def test_dead_tensors_leave_and_recycled_ids_are_not_trusted() -> None:
    cache: Derived[float] = Derived("sum")
    for value in range(50):  # ids and addresses recur
        x = torch.full((4,), float(value))
        assert cache.get(x, lambda x=x: float(x.sum())) == 4 * value  # type: ignore[misc]
        del x
    gc.collect()
    assert len(cache) <= 1, "entries outlive their tensors"


def test_inference_tensors_are_never_cached_and_warn() -> None:
    cache: Derived[float] = Derived("sum")
    with torch.inference_mode():
        x = torch.ones(3)
        make, _ = counted(x)
        with pytest.warns(RuntimeWarning, match="inference_mode"):
            before = cache.get(x, make)
        x.mul_(2)
        with pytest.warns(RuntimeWarning, match="inference_mode"):
            after = cache.get(x, make)
    assert (before, after) == (3, 6)


def test_scales_decoded_while_torch_compiles_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # newer versions of torch call a whole compilation "compiling", backends included, where real tensors are at hand
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    bits, exponent = torch.ones(3).half().view(torch.int16), torch.tensor(1, dtype=torch.int8)
    assert decoded(bits, exponent).tolist() == [2.0] * 3
    assert decoded(bits, exponent) is decoded(bits, exponent)


def test_an_address_that_is_taken_again_is_no_evidence() -> None:
    cache: Derived[float] = Derived("first value")
    tensor = torch.ones(1 << 24)  # so large that the allocator gives the memory back, and takes the same anew
    seen = Seen(tensor)
    assert cache.get(tensor, lambda: float(tensor[0])) == 1
    for value in (2.0, 3.0):
        tensor.data = torch.full_like(tensor, value)
    assert not seen.holds(tensor)
    assert cache.get(tensor, lambda: float(tensor[0])) == 3

"""The C++ operators: built once by any number of processes, never stale, never repacking, and gone where they fail."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bwla_compiler.codegen import torch_library
from bwla_compiler.codegen.cpp_ops import emit_operators
from bwla_compiler.codegen.library import OPS_ENTRIES
from bwla_compiler.numerics.half import to_half_bits
from bwla_compiler.numerics.planes import pack_signs
from bwla_compiler.runtime import native, ops, reference
from bwla_compiler.runtime.halves import decoded
from bwla_compiler.runtime.native import NativeOperators

BWLA = torch.ops.bwla
assert ops.LIBRARY is not None


@pytest.fixture
def installed() -> NativeOperators:
    native.install()
    found = native.operators()
    assert found is not None, "the tests need a C++ compiler and torch's headers"
    return found


@pytest.fixture
def found_anew(installed: NativeOperators) -> Iterator[None]:
    """Take the operators back; the next call finds them anew."""
    installed.unregister()
    native.operators.cache_clear()
    yield
    native.operators.cache_clear()


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    bits, exponent = to_half_bits(values)
    return bits, torch.tensor(exponent, dtype=torch.int8)


def weights(out: int, columns: int, *, seed: int = 0, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    signs = pack_signs(torch.randint(0, 2, (1, out, columns), generator=g, dtype=torch.int8) * 2 - 1)
    return signs, *halves(torch.rand(1, out, groups, generator=g) + 0.5)


def call(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bits: int = 6) -> Tensor:
    signs, scale, exponent = weight
    y: Tensor = BWLA.linear(x, signs, scale, None, None, None, None, None, bits, exponent)
    return y


def exact(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bits: int = 6) -> Tensor:
    return reference.linear(x, weight[0], decoded(*weight[1:]), None, None, None, bits)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("edit", ["copy_", "data", "exponent", "unseen exponent"])
def test_edited_bits_are_never_stale(installed: NativeOperators, edit: str, groups: int) -> None:
    weight, other, x = weights(9, 300, groups=groups), weights(9, 300, seed=5, groups=groups), inputs(2, 300)
    before = call(x, weight)
    if edit == "copy_":
        weight[0].copy_(other[0])
        weight[1].copy_(other[1])
    elif edit == "data":
        weight[0].data, weight[1].data = other[0].clone(), other[1].clone()
    elif edit == "exponent":
        weight[2].add_(1)
    else:
        weight[2].data.add_(1)  # neither address nor version moves; the value itself is compared
    after = call(x, weight)
    assert not torch.equal(after, before)
    # 300 float32 additions; the outputs are of the order of ten
    torch.testing.assert_close(after.double(), exact(x, weight), rtol=1e-5, atol=2e-4)


def test_unseen_edit_needs_forget(installed: NativeOperators) -> None:
    weight, x = weights(9, 64), inputs(1, 64)
    before = call(x, weight)
    weight[0].data.bitwise_not_()
    native.forget(weight[0])
    torch.testing.assert_close(call(x, weight), -before, rtol=1e-6, atol=1e-6)  # the same sums, negated


def test_recycled_addresses_are_never_stale(installed: NativeOperators) -> None:
    x = inputs(1, 64)
    for seed in range(30):  # each round frees tensors whose addresses the next one takes
        weight = weights(8, 64, seed=seed)
        torch.testing.assert_close(call(x, weight).double(), exact(x, weight), rtol=1e-5, atol=1e-4)  # 64 additions
        del weight


def test_views_with_other_counters_are_not_confused(installed: NativeOperators) -> None:
    signs, *scale = weights(9, 64)
    weight, x = (signs.clone(), *scale), inputs(1, 64)
    weight[0].bitwise_not_()
    call(x, weight)
    alias = weight[0].data  # shares memory, counts its own edits
    alias.bitwise_not_()
    assert alias._version == weight[0]._version
    seen = (alias, *weight[1:])
    torch.testing.assert_close(call(x, seen).double(), exact(x, seen), rtol=1e-5, atol=1e-4)  # 64 additions


def test_nothing_is_derived_twice_eagerly_or_compiled(installed: NativeOperators) -> None:
    x, chain = inputs(1, 64), [weights(64, 64, seed=s) for s in range(3)]

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, parts in enumerate(chain):
                for name, part in zip(("signs", "scale", "exponent"), parts, strict=True):
                    self.register_buffer(f"{name}{i}", part)

        def forward(self, x: Tensor) -> Tensor:
            for i in range(3):
                parts = (self.get_buffer(f"{name}{i}") for name in ("signs", "scale", "exponent"))
                x = call(x / 64, tuple(parts))  # type: ignore[arg-type]
            return x

    module = Chain()
    with torch.no_grad():
        want = module(x)
        first = installed.derived()
        assert torch.equal(module(x), want)
        assert installed.derived() == first
        function = torch.compile(module, fullgraph=True, backend="inductor")
        for _ in range(3):
            torch.testing.assert_close(function(x), want)
        assert installed.derived() == first, "the graph does not hand over the module's own tensors"


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (3, 7), (24, 32), (17, 33), (5, 50)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transform_on_odd_shapes(installed: NativeOperators, shape: tuple[int, int], dtype: torch.dtype) -> None:
    n1, n2 = shape
    x = inputs(2, 3, n1 * n2).to(dtype)
    scale, left, right = inputs(n1 * n2), inputs(n1, n1), inputs(n2, n2)
    for picked in ((scale, left, right), (None, left, None), (None, None, right), (scale, None, None)):
        stored = [(None, None) if t is None else halves(t) for t in picked]
        y = BWLA.transform(x, *(bits for bits, _ in stored), *(exponent for _, exponent in stored))
        values = [None if bits is None else decoded(bits, exponent) for bits, exponent in stored]
        want = reference.transform(x, *values)
        assert y.dtype == dtype
        # two float32 sums of up to 50 terms of order one, then one rounding to the dtype
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=1e-4)


def test_ids_that_leave_the_table(installed: NativeOperators) -> None:
    codes, (scale, exponent) = torch.ones(4, 8, dtype=torch.int8), halves(torch.arange(1.0, 5.0))
    for out_of_range in (-1, 4):
        with pytest.raises(IndexError):
            BWLA.int8_embedding(torch.tensor([out_of_range]), codes, scale, torch.float32, exponent)
    empty = BWLA.int8_embedding(torch.empty(0, 2, dtype=torch.long), codes, scale, torch.half, exponent)
    assert empty.shape == (0, 2, 8)


def test_double_input_goes_the_portable_way(installed: NativeOperators) -> None:
    weight, x = weights(9, 40), inputs(2, 40).double()
    y = call(x, weight)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, exact(x, weight), rtol=1e-5, atol=1e-4)  # 40 float32 additions


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_kernels_compute_on_as_many_threads_as_torch_does(installed: NativeOperators, wanted: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        assert installed.team(wanted) == wanted
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot have pages back on demand")
@pytest.mark.parametrize("rows", [2000, 12_000])
def test_large_results_take_the_memory_of_freed_ones_and_of_no_others(installed: NativeOperators, rows: int) -> None:
    x, scale = inputs(rows, 1024), torch.full((1024,), 2.0)

    def doubled(x: Tensor) -> Tensor:
        y: Tensor = BWLA.transform(x, scale, None, None)
        return y

    first, second = doubled(x), doubled(-x)
    assert torch.equal(first, 2 * x)
    assert torch.equal(second, -2 * x)
    address, row = first.data_ptr(), first[7]
    del first
    third = doubled(-x)  # a row of the first one still lives
    assert third.data_ptr() not in (address, second.data_ptr())
    assert torch.equal(row, 2 * x[7])
    del row
    smaller = doubled(x[rows // 4 :])
    assert smaller.data_ptr() != address
    again = doubled(x)
    assert again.data_ptr() == address
    for y, expected in ((again, x), (second, -x), (third, -x), (smaller, x[rows // 4 :])):
        assert torch.equal(y, 2 * expected)


def test_no_more_than_some_of_the_memory_of_freed_results_is_kept(installed: NativeOperators) -> None:
    scale, page = torch.ones(1024), 2 << 20
    results = [BWLA.transform(inputs(512 * n, 1024), scale, None, None) for n in range(1, 14)]  # 2 to 26 MiB
    addresses = [y.data_ptr() for y in results]
    assert all(address % page == 0 for address in addresses)
    while results:
        results.pop(0)  # the last two, 50 MiB, are kept, and the third last would be too much beside them
    again = [BWLA.transform(inputs(512 * n, 1024), scale, None, None).data_ptr() for n in (13, 12)]
    assert again == addresses[:-3:-1]


def test_a_result_that_no_memory_holds_is_an_error_that_says_so(installed: NativeOperators) -> None:
    table, ids = torch.zeros(1, 1 << 20, dtype=torch.int8), torch.zeros(1 << 23, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no memory for a result of 33554432 MiB; a shorter prompt"):
        BWLA.int8_embedding(ids, table, torch.ones(1), torch.float32)


def test_calls_from_several_threads(installed: NativeOperators) -> None:
    x, chain = inputs(1, 64), [weights(64, 64, seed=s) for s in range(20)]
    with ThreadPoolExecutor(4) as pool:
        for y, weight in zip(pool.map(lambda w: call(x, w), chain * 3), chain * 3, strict=True):
            torch.testing.assert_close(y.double(), exact(x, weight), rtol=1e-5, atol=1e-4)  # 64 additions


def test_source_names_every_entry_and_fits_any_machine() -> None:
    source = emit_operators()
    table = source.partition("struct Kernels {")[2].partition("};")[0]
    assert [line.partition("(*")[2].partition(")")[0] for line in table.strip().splitlines()] == list(OPS_ENTRIES)
    assert "immintrin" not in source


def test_source_that_does_not_compile_warns_once_and_is_right(
    found_anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_library, "emit_operators", lambda: "#error no such torch\n")
    weight, x = weights(9, 40), inputs(2, 40)
    with caplog.at_level(logging.WARNING):
        y = call(x, weight)
        call(x, weight)
    assert len(caplog.records) == 1
    assert "no such torch" in caplog.text
    torch.testing.assert_close(y.double(), exact(x, weight), rtol=1e-5, atol=1e-4)  # 40 float32 additions


def test_library_of_another_torch_warns_and_is_right(
    found_anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "operators.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "build_operators", lambda: broken)
    weight, x = weights(9, 40), inputs(2, 40)
    with caplog.at_level(logging.WARNING):
        y = call(x, weight)
    assert "does not load" in caplog.text
    torch.testing.assert_close(y.double(), exact(x, weight), rtol=1e-5, atol=1e-4)  # 40 float32 additions


def test_the_first_call_of_a_process_gives_the_bits_of_every_later_one(
    found_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(2)
    left, right, x = (torch.randn(*shape, generator=g) for shape in ((8, 8), (9, 9), (64, 72)))
    weight, codes = weights(9, 72), torch.randint(-127, 128, (9, 72), generator=g, dtype=torch.int8)
    calls = {
        "transform": lambda: BWLA.transform(x, None, left, right),
        "linear": lambda: call(x[:3], weight),
        "int8_linear": lambda: BWLA.int8_linear(x[:3], codes, torch.ones(9), None),
    }
    for name, compute in calls.items():
        native.operators().unregister()  # type: ignore[union-attr]
        assert torch.equal(compute(), compute()), name
    native.operators().unregister()  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(native, "install", lambda: False)
        slow = calls["transform"]()
    assert not torch.equal(slow, calls["transform"]()), "Python adds in the same order: nothing is tested here"


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    code = (
        "import torch; from bwla_compiler.runtime import native, ops; "
        "y = torch.ops.bwla.transform(torch.ones(2, 4), torch.ones(4), None, None); "
        "print(native.operators().registered, float(y.sum()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "BWLA_CACHE": str(tmp_path)}

    def run(_: int) -> str:
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == ["True 8.0\n"] * 2
    assert len(list((tmp_path / "kernels").glob("operators-*.so"))) == 1
    left = [path for path in (tmp_path / "kernels").iterdir() if path.suffix != ".lock"]
    assert len(left) == 2, "temporary files stay behind"

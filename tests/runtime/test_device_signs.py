"""Signs in the layout of their device: one copy there, canonical bytes in files, whatever way they move."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bwla_compiler.codegen import triton_module
from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.runtime import device_signs, native, ops
from bwla_compiler.runtime.bits import measure_bits
from bwla_compiler.runtime.device_signs import settle_signs
from bwla_compiler.runtime.modules import PackedLinear, stored_bytes
from bwla_compiler.runtime.triton_layout import bytes_of, words_of
from bwla_compiler.spec import LinearSpec

assert ops.LIBRARY is not None
Wants = Callable[[bool], None]


@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 2), st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_the_kernels_layout_gives_back_the_same_bytes(columns: int, out: int, planes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 256, (planes, out, -(-columns // 8)), dtype=torch.uint8, generator=generator)
    words = words_of(signs, columns)
    assert words.shape == (planes, -(-columns // 128), out, 4)
    assert torch.equal(bytes_of(words, columns), signs)


@pytest.fixture
def wants(monkeypatch: pytest.MonkeyPatch) -> Wants:
    """Have the CPU stand for a device that Triton serves, or no longer."""
    return lambda yes: monkeypatch.setattr(device_signs, "_wants_words", lambda signs: yes)


def packed(*, columns: int = 200, seed: int = 0) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (2, 24, columns), dtype=torch.int8, generator=generator) * 2 - 1
    return PackedLinear.from_binary(BinaryWeight(signs, torch.rand(2, 24, 1, generator=generator)), activation_bits=8)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_there_is_one_copy_and_it_is_saved_as_before(wants: Wants) -> None:
    model = nn.Sequential(packed(), packed(seed=1))
    state, n_bytes, bits = state_of(model), stored_bytes(model), measure_bits(model)
    dense = model[0].dense_weight()
    wants(True)
    model.to("cpu")
    assert [m.signs.dtype for m in model] == [torch.int32] * 2
    assert not any(t.dtype == torch.uint8 for t in model.buffers())
    assert_equal(model.state_dict(), state)
    assert (stored_bytes(model), measure_bits(model)) == (n_bytes, bits)
    assert torch.equal(model[0].dense_weight(), dense)
    assert model[0].planes == 2
    assert model[0].spec == packed().spec
    wants(False)
    model.to("cpu")
    assert [m.signs.dtype for m in model] == [torch.uint8] * 2
    assert_equal(model.state_dict(), state)


@pytest.mark.parametrize("assign", [False, True])
def test_canonical_states_are_read_into_the_layout(assign: bool, wants: Wants) -> None:
    wants(True)
    module, other = packed().to("cpu"), state_of(packed(seed=1))
    given = dict(other)
    module.load_state_dict(given, assign=assign)
    assert module.signs.dtype == torch.int32
    assert_equal(module.state_dict(), other)
    assert_equal(given, other)  # what was handed in is left alone
    with pytest.raises(RuntimeError, match="size mismatch for signs"):
        module.load_state_dict(other | {"signs": other["signs"][:1]}, assign=assign)


def test_copies_and_pickles_settle_where_they_are_read(wants: Wants) -> None:
    wants(True)
    module = packed().to("cpu")
    expected = state_of(module)
    assert_equal(copy.deepcopy(module).state_dict(), expected)
    file = io.BytesIO()
    torch.save(module, file)
    wants(False)
    file.seek(0)
    read: Any = torch.load(file, weights_only=False)
    assert read.signs.dtype == torch.uint8
    assert_equal(read.state_dict(), expected)


def test_plain_torch_reads_the_layout_too(wants: Wants, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BWLA_KERNELS", "torch")
    monkeypatch.setattr(native, "install", lambda: False)
    linear, x = packed(), torch.randn(3, 200, generator=torch.Generator().manual_seed(2))
    expected = linear(x)
    wants(True)
    settle_signs(linear)
    assert torch.equal(linear(x), expected)


@pytest.mark.skipif(not triton_module.installed(), reason="triton is not installed")
def test_a_gpu_holds_the_words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BWLA_KERNELS", raising=False)
    with FakeTensorMode():
        module = PackedLinear(LinearSpec(in_features=256, out_features=(24,)))
        module._apply(moved("cuda"))  # what .to does, which asks for a real device
        held = {name: (t.dtype, tuple(t.shape)) for name, t in module.named_buffers() if t.device.type == "cuda"}
        assert held["signs"] == (torch.int32, (1, 2, 24, 4))
        assert torch.uint8 not in {dtype for dtype, _ in held.values()}
        assert module(torch.empty(3, 256, device="cuda")).shape == (3, 24)
        saved = module.state_dict()["signs"]
        assert (saved.dtype, saved.shape) == (torch.uint8, (1, 24, 32))
        assert module._apply(moved("cpu")).signs.dtype == torch.uint8


def moved(device: str) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.new_empty(tensor.shape, device=device)

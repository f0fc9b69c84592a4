"""The host side of the Triton operators on CUDA tensors that are not there: no question to the device, right grids."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bwla_compiler.codegen import triton_module
from bwla_compiler.codegen.triton_spec import Emitted
from bwla_compiler.errors import BwlaError
from bwla_compiler.runtime import derived, on_triton, ops, triton_tuner
from bwla_compiler.runtime.compiled import Linear
from bwla_compiler.runtime.derived import Derived
from bwla_compiler.runtime.portable import Prologue

pytestmark = pytest.mark.skipif(not triton_module.installed(), reason="triton is not installed")

Launch = tuple[Emitted, tuple[int, ...], dict[str, Any]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Record launches in place of making them, on fake CUDA tensors: whatever asks for a value of one raises."""
    seen: list[Launch] = []

    def record(emitted: Emitted, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        seen.append((emitted, grid, {name: arguments[name] for name, _ in emitted.parameters}))

    def packed(signs: Tensor, columns: int) -> Tensor:
        return signs.new_empty(signs.shape[0], math.ceil(columns / 128), signs.shape[1], 4, dtype=torch.int32)

    monkeypatch.setattr(on_triton, "launch", record)
    monkeypatch.setattr(on_triton, "packed_signs", packed)  # kept by tensor, as `prepare` has them derived before
    triton_tuner.forget_choices()
    with FakeTensorMode(), torch.device("cuda"):
        yield seen
    triton_tuner.forget_choices()


def linear(out: int, columns: int, rank: int) -> Linear:
    pair = (
        torch.empty(rank, columns, dtype=torch.int8),
        torch.empty(out, rank, dtype=torch.int8),
        torch.empty(rank),
    )
    signs = torch.empty(1, out, columns // 8, dtype=torch.uint8)
    return Linear(signs, torch.empty(1, out, 1), pair if rank else None, None)


TURNED = ["prologue"] * 3


@pytest.mark.parametrize(
    "tokens, names",
    [
        (1, [*TURNED, "linear_gemv"]),
        (8, [*TURNED, "low_rank", "linear_dot", "linear_sum"]),
        (2048, [*TURNED, "low_rank", "linear_dot"]),
    ],
)
def test_the_widest_linear_of_a_model(tokens: int, names: list[str], launches: list[Launch]) -> None:
    x, gate = (torch.empty(tokens, 25600, dtype=torch.bfloat16) for _ in range(2))
    steps = Prologue("silu_mul", gate=gate, left=torch.empty(128, 128), right=torch.empty(200, 200))
    residual = torch.empty(tokens, 5120, dtype=torch.bfloat16)
    (y,) = on_triton.fused(x, steps, [linear(5120, 25600, 80)], [residual], None, 6)
    assert (y.shape, y.dtype, y.device.type) == ((tokens, 5120), torch.bfloat16, "cuda")
    assert [emitted.name for emitted, _, _ in launches] == names
    for emitted, grid, own in launches:
        assert all(n > 0 for n in grid), emitted.title
        assert all(value.device.type == "cuda" for value in own.values() if isinstance(value, Tensor))
    beside = 40 if tokens == 1 else 0  # two components of the low-rank pair each
    assert [grid for _, grid, _ in launches[:3]] == [(tokens, 8), (tokens, 13), (tokens, 1 + beside)]
    assert {choice.how for choice in triton_tuner.choices().values()} == {"modelled"}


@pytest.mark.parametrize("tokens, expected", [(1, 10), (8, 14), (32, 17)])
def test_launches_of_a_layer_of_qwen3_32b(tokens: int, expected: int, launches: list[Launch]) -> None:
    x, turned, wide = (torch.empty(tokens, n, dtype=torch.bfloat16) for n in (5120, 8192, 25600))
    norm, turn = Prologue("rms_norm", 1e-6), Prologue(left=torch.empty(64, 64))
    gate = Prologue("silu_mul", gate=wide, left=torch.empty(128, 128), right=torch.empty(200, 200))
    qkv = [linear(8192, 5120, 80), linear(1024, 5120, 26), linear(1024, 5120, 26)]
    on_triton.fused(x, norm, qkv, [None] * 3, None, 6)
    on_triton.fused(turned, turn, [linear(5120, 8192, 80)], [x], None, 6)
    on_triton.fused(x, norm, [linear(25600, 5120, 80)] * 2, [None] * 2, None, 6)
    on_triton.fused(wide, gate, [linear(5120, 25600, 80)], [x], None, 6)
    # of more tokens there are also sums of parts, and from 9 on kernels of low-rank pairs
    assert len(launches) == expected


def test_members_with_other_ranks_are_one_launch(launches: list[Launch]) -> None:
    x = torch.empty(1, 5120, dtype=torch.bfloat16)
    members = [linear(8192, 5120, 80), linear(1024, 5120, 26), linear(1024, 5120, 0)]
    ys = on_triton.fused(x, Prologue("rms_norm", 1e-6), members, [None] * 3, None, 6)
    assert [y.shape[1] for y in ys] == [8192, 1024, 1024]
    assert [emitted.name for emitted, _, _ in launches] == ["prologue", "linear_gemv"]
    assert launches[0][1] == (1, 1 + 40 + 13), "two components of the low-rank pairs a program"
    emitted, grid, own = launches[-1]
    assert "dp4a.u32.s32" in emitted.source
    rows = int(emitted.source.split("ROWS = tl.constexpr(")[1].split(")")[0])
    assert grid == (10240 // rows, 1)
    assert own["mixed"].shape[1:] == (1, 106)


def test_sums_of_parts_are_as_large_as_they_must_be(launches: list[Launch]) -> None:
    on_triton.linears(torch.empty(8, 25600), [linear(5120, 25600, 0)], None, 6)
    _, grid, own = next(one for one in launches if one[0].name == "linear_dot")
    assert own["partial"].shape == (grid[2], 1, 8, 5120)
    assert own["partial"].dtype == torch.int32


def test_a_traced_launch_is_seen_as_a_triton_kernel() -> None:
    def head(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return on_triton.int8_linear(x, codes, scale, None)

    with FakeTensorMode(), torch.device("cuda"):
        operands = (torch.empty(8, 256), torch.empty(100, 256, dtype=torch.int8), torch.empty(100))
        graph = make_fx(head)(*operands).graph
    kernels = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(kernels) == 1
    assert kernels[0].kwargs["grid"] == [(2, 1, 1)]


@pytest.mark.parametrize("tokens, launched", [(1, 2), (8, 3)])
def test_operators_are_calls_and_decomposed_they_are_triton_kernels(tokens: int, launched: int) -> None:
    op = torch.ops.bwla.linear.default

    def run(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = op(x, words, scale, None, None, None, None, None, 6)
        return y

    with FakeTensorMode(), torch.device("cuda"):
        x, words = torch.empty(tokens, 4096), torch.empty(1, 32, 256, 4, dtype=torch.int32)
        operands = (x, words, torch.empty(1, 256, 1))
        whole = make_fx(run)(*operands).graph
        taken_apart = make_fx(run, decomposition_table={op: ops._linear_with(False)})(*operands).graph
    assert [node.target for node in whole.nodes if node.op == "call_function"] == [op]
    kernels = [node for node in taken_apart.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(kernels) == launched  # the prologue, then one decode kernel, or a product in parts and their sum


def test_nothing_is_derived_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Derived[int] = Derived("layout")
    known, new = torch.ones(2), torch.ones(2)
    assert cache.get(known, lambda: 1) == 1
    monkeypatch.setattr(derived, "_recording", lambda tensor: True)
    assert cache.get(known, lambda: 2) == 1
    with pytest.raises(BwlaError, match="layout is asked for while a CUDA graph is recorded"):
        cache.get(new, lambda: 3)


def test_a_slow_path_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BWLA_KERNELS", raising=False)
    monkeypatch.setattr(triton_module, "installed", lambda: False)
    on_triton.warn_slow.cache_clear()
    with FakeTensorMode():
        x = torch.empty(2, 4, device="cuda")
        with pytest.warns(RuntimeWarning, match="not installed; install it with: pip install 'triton>=3.6'"):
            assert not on_triton.serves(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not on_triton.serves(x)

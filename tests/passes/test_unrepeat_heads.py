"""UnrepeatHeads: attention reads the heads themselves, with the same bits; all else stays, with the reason."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import remove_noop_ops
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.integrations.sdpa_attention import repeat_kv

from bwla_compiler.passes.unrepeat_heads import UnrepeatHeads

ATEN = torch.ops.aten
ATTENTION = ATEN._scaled_dot_product_flash_attention_for_cpu.default
Function = Callable[..., Any]
attend = nn.functional.scaled_dot_product_attention


def operands(
    *, heads: int = 2, length: int = 7, new: int = 5, size: int = 8, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return queries [2, 4, new, size], keys and values [2, heads, length, size]."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 4, new, size), (2, heads, length, size), (2, heads, length, size)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def traced(function: Function, inputs: Sequence[Tensor], *, mode: str = "fake") -> GraphModule:
    """Return the graph of a function as the pass meets it: Inductor's decompositions of what torch dispatches."""
    with torch.no_grad():
        found: GraphModule = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode=mode)(*inputs)
    remove_noop_ops(found.graph)  # as Inductor does before: with symbolic sizes indexing leaves slices of the whole
    return found


def attentions(gm: GraphModule) -> list[Node]:
    return gm.graph.find_nodes(op="call_function", target=ATTENTION)


def heads_read(gm: GraphModule) -> tuple[Any, Any]:
    """Return how many heads of keys and of values the only attention reads."""
    (node,) = attentions(gm)
    key, value = node.args[1:3]
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    return key.meta["val"].shape[1], value.meta["val"].shape[1]


def n_expanded(gm: GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=ATEN.expand.default))


REPEATS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "transformers": repeat_kv,
    "interleaved": lambda x, n: x.repeat_interleave(n, dim=1),
    "interleaved by a function": lambda x, n: torch.repeat_interleave(x, n, -3).contiguous(),
}
MASKS: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]] = {
    "none": lambda q, k: {},
    "causal": lambda q, k: {"is_causal": True},
    "floats": lambda q, k: {"attn_mask": (0.5 * k[:1, :1, :, 0]).expand(2, 1, q.shape[2], k.shape[2])},
    "choices": lambda q, k: {"attn_mask": k[:, :1, None, :, 0] < 1.0, "scale": 0.3},
}


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_reads_the_heads_themselves(mask: str, dtype: torch.dtype, new: int) -> None:
    inputs = operands(new=new, dtype=dtype)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, repeat_kv(k, 2), repeat_kv(v, 2), **MASKS[mask](q, k))

    gm = traced(function, inputs)
    assert heads_read(gm) == (4, 4)
    masked = n_expanded(gm) - 2  # the mask may be expanded too
    report = UnrepeatHeads().run(gm.graph)
    gm.recompile()
    (name, outcome), *others = report.changed
    assert (name, outcome) == (attentions(gm)[0].name, "each head of keys and values is read by 2 of queries")
    assert not others
    assert not report.skipped
    assert heads_read(gm) == (2, 2)
    assert n_expanded(gm) == masked
    assert torch.equal(gm(*inputs), function(*inputs))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("repeat", REPEATS)
def test_ways_of_repeating(repeat: str, heads: int) -> None:
    inputs = operands(heads=heads)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, REPEATS[repeat](k, 4 // heads), REPEATS[repeat](v, 4 // heads))

    gm = traced(function, inputs)
    assert len(UnrepeatHeads().run(gm.graph).changed) == 1
    gm.recompile()
    assert heads_read(gm) == (heads, heads)
    assert n_expanded(gm) == 0
    assert torch.equal(gm(*inputs), function(*inputs))


@pytest.mark.parametrize("repeat", REPEATS)
def test_symbolic_sizes(repeat: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, REPEATS[repeat](k, 2), REPEATS[repeat](v, 2))

    gm = traced(function, operands(), mode="symbolic")
    assert len(UnrepeatHeads().run(gm.graph).changed) == 1
    gm.recompile()
    assert n_expanded(gm) == 0
    for length in (9, 33):
        inputs = operands(length=length, new=4)
        assert torch.equal(gm(*inputs), function(*inputs))


def test_a_cache_that_is_written_in_the_same_step() -> None:
    inputs = [*operands(length=12, new=1), *operands(new=1, length=1)[1:], torch.tensor([5])]

    def function(q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        keys, values = keys.index_copy(2, at, k), values.index_copy(2, at, v)
        return attend(q, repeat_kv(keys, 2), repeat_kv(values, 2))

    gm = traced(function, inputs)
    assert len(UnrepeatHeads().run(gm.graph).changed) == 1
    gm.recompile()
    assert heads_read(gm) == (2, 2)
    assert torch.equal(gm(*inputs), function(*inputs))


def tiled(x: Tensor) -> Tensor:
    """Return the heads one after the other, twice: [0, 1, 0, 1]."""
    batch, heads, length, size = x.shape
    return x[:, None].expand(batch, 2, heads, length, size).reshape(batch, 2 * heads, length, size)


def across(x: Tensor) -> Tensor:
    """Return four heads of pairs of positions, in the order in which reshape cuts copies of each position."""
    batch, heads, length, size = x.shape
    return x[:, :, :, None].expand(batch, heads, length, 2, size).reshape(batch, 2 * heads, length, size)


def broadcast(x: Tensor) -> Tensor:
    """Return the first sequence's heads for both sequences."""
    _, heads, length, size = x.shape
    return x[:1, :, None].expand(2, heads, 2, length, size).reshape(2, 2 * heads, length, size)


def uneven(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, repeat_kv(k, 2), repeat_kv(v[:, :1], 4))


def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    return attend(q, repeat_kv(turned, 2), repeat_kv(v, 2))


def edited(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    own = k + 1
    keys = repeat_kv(own, 2)
    own.mul_(2)
    return attend(q, keys, repeat_kv(v, 2)) + own.sum()


COPIES = "no copies of fewer heads"
LEFT_ALONE: dict[str, tuple[str, Function]] = {
    "heads of their own": (COPIES, lambda q, k, v: attend(q, q * 2, q * 3)),
    "grouped already": (COPIES, lambda q, k, v: attend(q, k, v, enable_gqa=True)),
    "keys alone": (COPIES, lambda q, k, v: attend(q, repeat_kv(k, 2), q[:, :, :1].expand(2, 4, k.shape[2], 8))),
    "another order of heads": (COPIES, lambda q, k, v: attend(q, tiled(k), tiled(v))),
    "copies of positions": (COPIES, lambda q, k, v: attend(q, across(k), across(v))),
    "one sequence for all": (COPIES, lambda q, k, v: attend(q, broadcast(k), broadcast(v))),
    "changed after copying": (COPIES, lambda q, k, v: attend(q, repeat_kv(k, 2) * 2, repeat_kv(v, 2))),
    "other shares": ("its keys are copied 2 times, its values 4 times", uneven),
    "strides that the kernel does not take": ("is not dense in its last dimension", sparse),
    "edited after copying": ("mul_ edits a tensor in place", edited),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_all_else_is_left_alone_with_the_reason(case: str) -> None:
    reason, function = LEFT_ALONE[case]
    gm = traced(function, operands())
    before = str(gm.graph)
    report = UnrepeatHeads().run(gm.graph)
    ((name, found),) = report.skipped
    assert name == attentions(gm)[0].name
    assert reason in found
    assert not report.changed
    assert str(gm.graph) == before
    gm.recompile()
    assert torch.equal(gm(*operands()), function(*operands()))


def test_attention_that_has_not_the_kernel_is_not_ours() -> None:
    """Keys and values of two sizes are computed by products of matrices, which want the copies."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, repeat_kv(k, 2), repeat_kv(v[..., :4].contiguous(), 2))

    gm = traced(function, operands())
    assert not attentions(gm)
    report = UnrepeatHeads().run(gm.graph)
    assert not report.changed
    assert not report.skipped


def test_copies_that_others_read_stay_for_them() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys = repeat_kv(k, 2)
        return attend(q, keys, repeat_kv(v, 2)), keys.exp()

    gm = traced(function, operands())
    assert len(UnrepeatHeads().run(gm.graph).changed) == 1
    gm.recompile()
    assert heads_read(gm) == (2, 2)
    assert n_expanded(gm) == 1
    for found, expected in zip(gm(*operands()), function(*operands()), strict=True):
        assert torch.equal(found, expected)


def test_keys_that_are_the_values() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = repeat_kv(k, 2)
        return attend(q, both, both)

    gm = traced(function, operands())
    assert len(UnrepeatHeads().run(gm.graph).changed) == 1
    gm.recompile()
    assert n_expanded(gm) == 0
    assert torch.equal(gm(*operands()), function(*operands()))


def test_twice_is_once() -> None:
    gm = traced(lambda q, k, v: attend(q, repeat_kv(k, 2), repeat_kv(v, 2)), operands())
    UnrepeatHeads().run(gm.graph)
    before = str(gm.graph)
    assert UnrepeatHeads().run(gm.graph).changed == []
    assert str(gm.graph) == before

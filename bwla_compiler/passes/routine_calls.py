"""Calls of a graph that may be steps of a routine: what each reads and gives, and the step it becomes."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._functorch._aot_autograd.descriptors import BufferAOTInput, ParamAOTInput, PlainAOTInput
from torch.fx import Graph, Node

from bwla_compiler.passes.graph_order import is_edit
from bwla_compiler.passes.match_graph import calls, operands, sliced
from bwla_compiler.passes.match_prologue import same_size
from bwla_compiler.passes.packed_calls import OPS, PART
from bwla_compiler.runtime.routines import ALL, Attention, Member, Place, Rows, Step
from bwla_compiler.runtime.triton_layout import n_rows
from bwla_compiler.spec import FLOAT_BITS

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default)
GROUP, PROLOGUE, TRANSFORM = OPS.fused_group.default, OPS.prologue.default, OPS.transform.default
ATTENTION = OPS.cached_attention.default

# Places among the operands of bwla::fused_group; see routines.Step and routines.Member for their order.
_GATE, _KIND, _EPS, _GAIN, _SHIFT, _SIGNS, _RESIDUAL, _BITS = 1, 2, 3, 4, 5, 12, 19, 20
_WEIGHTS, _MEMBER = (6, 7, 8, 9, 10, 11, 14, 22), (12, 13, 15, 16, 17, 18, 21, 23)

# And of bwla::cached_attention.
_ROWS, _OTHERS, _CACHES, _SCALE = (0, 1, 2), (3, 4, 5, 6, 7, 8, 10, 11, 12), (5, 6, 10, 11), 9

Call = Any
"""A Node that calls an operator of ours, whose operands have the types of its schema."""


@dataclass(frozen=True)
class _Channels:
    """What a norm by head or attention reads: channels of a value from `first` on, seen through views.

    through: the views, in order from the reader. heads: 1 where there are no heads apart.
    """

    source: Node
    first: int
    heads: int
    size: int
    through: tuple[Node, ...]


def has_known_inputs(graph: Graph) -> bool:
    """Whether a graph's inputs are tensors of its module, and then the arguments of its program in their order."""
    described = [node.meta.get("desc") for node in graph.nodes if node.op == "placeholder"]
    plain = [one.idx for one in described if isinstance(one, PlainAOTInput)]
    known = all(isinstance(one, (PlainAOTInput, ParamAOTInput, BufferAOTInput)) for one in described)
    return known and plain == list(range(len(plain)))


def refusal(call: Call) -> str:
    """Return why a call cannot be in a routine, or ""."""
    x = call.args[0].meta["val"]
    if x.device != torch.device("cpu"):
        return f"its input is on {x.device}"
    if not isinstance(x.shape[-1], int) or (call.target is not GROUP and None in _channels(call)):
        return "its input has no fixed number of channels"
    strange = next((w for w in _weights(call) if w is not None and _place(w) is None), None)
    return "" if strange is None else f"{strange} is no input that stays as it is"


def activations(call: Call) -> list[Node]:
    """Return what a call reads and is no weight and no cache; what a norm by head reads, before it was split.

    A gain that the graph computes of a weight is among them.
    """
    if call.target is GROUP:
        read = [*(_whole(call.args[i])[0] for i in (0, _GATE)), *call.args[_RESIDUAL]]
    else:
        read = [channels.source for channels in _channels(call) if channels is not None]
    if call.target is ATTENTION:
        read += [_operand(call, i) for i in _OTHERS if i not in _CACHES]
    else:
        read += [value for value in _gains(call) if _place(value) is None]
    return [value for value in read if value is not None]


def caches(call: Call) -> list[Node]:
    """Return what a call edits."""
    found = [_operand(call, i) for i in _CACHES] if call.target is ATTENTION else []
    return [cache for cache in found if cache is not None]


def needed(call: Call) -> list[Node]:
    """Return what must come from the routine itself: there is nothing to gain by a norm of something else."""
    return activations(call)[:1] if call.target is PROLOGUE else []


def seen_through(call: Call) -> list[Node]:
    """Return the views of other calls' results that its step does without."""
    if call.target is GROUP:
        return [view for i in (0, _GATE) for view in _whole(call.args[i])[2]]
    return [view for channels in _channels(call) if channels is not None for view in channels.through]


def results(call: Call) -> list[list[Node]]:
    """Return the nodes that stand for each result of a call."""
    if call.target is not GROUP:
        return [[call]]
    return [[user for user in call.users if user.args[1] == i] for i in range(len(call.args[_SIGNS]))]


def source_of(value: Call) -> tuple[Call, int]:
    """Return (call, number of its result) for a value."""
    return (value.args[0], value.args[1]) if value.target is operator.getitem else (value, 0)


def step_of(call: Call, number: Callable[[Node | None], Place]) -> Step | Attention:
    """Return the step that a call becomes. number: of a value."""
    a = call.args
    if call.target is ATTENTION:
        return Attention(a[_SCALE], tuple(_rows(call, number)), tuple(number(_operand(call, i)) for i in _OTHERS))
    gain, shift = (_place(value) or number(value) for value in _gains(call))
    columns = a[0].meta["val"].shape[-1]
    if call.target is not GROUP:
        kind, eps = a[1:3] if call.target is PROLOGUE else ("none", 0.0)
        (channels,) = _channels(call)
        assert channels is not None
        x, transform = number(channels.source), tuple(map(_place, _weights(call)))
        weights = (*transform, *(None,) * (len(_WEIGHTS) - len(transform)))
        return Step(kind, eps, FLOAT_BITS, columns, channels.heads, x, None, gain, shift, weights, ())
    lists = zip(*(a[i] for i in _MEMBER), a[_RESIDUAL], strict=True)
    members = tuple(
        Member(n_rows(weights[0].meta["val"]), tuple(map(_place, weights)), number(residual))
        for *weights, residual in lists
    )
    weights = tuple(_place(a[i]) for i in _WEIGHTS)
    (read, first, _), (gate, gate_first, _) = (_whole(a[i]) for i in (0, _GATE))
    begins = (first, gate_first)
    return Step(
        a[_KIND], a[_EPS], a[_BITS], columns, 1, number(read), number(gate), gain, shift, weights, members, begins
    )  # fmt: skip


def _operand(call: Call, i: int) -> Node | None:
    found: Node | None = call.args[i] if i < len(call.args) else None
    return found


def _rows(call: Call, number: Callable[[Node | None], Place]) -> Iterator[Rows]:
    for channels in _channels(call):
        assert channels is not None
        place = number(channels.source)
        assert isinstance(place, int)
        yield Rows(place, channels.first, channels.heads, channels.size)


def _channels(call: Call) -> list[_Channels | None]:
    """Return what a norm by head, a transform or attention reads; None for what is no fixed channels of anything."""
    if call.target is TRANSFORM:
        x = call.args[0]
        return [_Channels(x, 0, 1, x.meta["val"].shape[-1], ())]
    if call.target is PROLOGUE:
        return [_split(call.args[0])]
    return [_heads_of(call.args[i]) for i in _ROWS]


def _split(x: Call) -> _Channels | None:
    """Return the channels that a norm reads, split into heads right before it or not."""
    source: Call = x.args[0] if x.target in _VIEWS else x
    shape, before = x.meta["val"].shape, source.meta["val"].shape
    if x is source or shape == before:
        return _Channels(source, 0, 1, shape[-1], () if x is source else (x,))
    if len(shape) < 2:
        return None
    heads, size = shape[-2:]
    fixed = isinstance(heads, int) and isinstance(size, int)
    fits = fixed and heads * size == before[-1] and shape[:-2] == before[:-1]
    return _Channels(source, 0, heads, size, (x,)) if fits and heads > 1 else None  # one would be taken for no split


def _heads_of(x: Call) -> _Channels | None:
    """Return the channels that rows [batch, tokens, heads, size] are, where they are some of a wider value."""
    *tokens, heads, size = x.meta["val"].shape
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    view: Call = x.args[0] if x.target in _VIEWS else None
    before = () if view is None else view.meta["val"].shape
    if len(before) != 3 or not all(map(same_size, before, (*tokens, heads * size))):
        return _Channels(x, 0, heads, size, ())
    cut = _cut(view)
    if cut is None:
        return _Channels(view, 0, heads, size, (x,))
    source, first, through = cut
    return _Channels(source, first, heads, size, (x, *through))


def _whole(x: Node | None) -> tuple[Node | None, int, tuple[Node, ...]]:
    """Return (value, first channel, nodes between) of what a fused group reads: some channels of a value, or ALL."""
    found = None if x is None else _cut(x)
    return (x, ALL, ()) if found is None else found


def _cut(x: Call) -> tuple[Node, int, tuple[Node, ...]] | None:
    """Return (value [.., channels], first channel, nodes between) where x is channels in a row of it."""
    if calls(x, operator.getitem) and calls(x.args[0], _ATEN.split.Tensor):
        source, each, dim = operands(x.args[0], 0, given=2)
        last = dim in (source.meta["val"].dim() - 1, -1)
        return (source, x.args[1] * each, (x, x.args[0])) if last and isinstance(each, int) else None
    found = sliced(x)
    return None if found is None else (found[0], found[1], (x,))


def _weights(call: Call) -> Iterator[Node | None]:
    """Yield every weight that a call reads, but gain and shift."""
    if call.target is TRANSFORM:
        yield from call.args[1:]
    if call.target is GROUP:
        for i in _WEIGHTS:
            yield call.args[i]
        for i in _MEMBER:
            yield from call.args[i]


def _gains(call: Call) -> tuple[Node | None, Node | None]:
    """Return gain and shift."""
    if call.target is TRANSFORM:
        return None, None
    gain, shift = call.args[3:] if call.target is PROLOGUE else call.args[_GAIN : _SHIFT + 1]
    return gain, shift


def _place(weight: Node | None) -> Place:
    """Return where a program finds a weight; None where it cannot, or where the graph itself edits it.

    Inductor, which does not see that a routine reads it, might put the edit first.
    """
    if weight is not None and weight.target is PART:
        anchor, name, _ = cast(tuple[Node, str, str], weight.args)
        return f"{place}.{name}" if isinstance(place := _place(anchor), str) and place[0] == "@" else None
    if weight is None or weight.op != "placeholder" or any(map(is_edit, weight.users)):
        return None
    described = weight.meta.get("desc")
    if isinstance(described, PlainAOTInput):
        return f"@{described.idx}"
    if isinstance(described, (ParamAOTInput, BufferAOTInput)) and not set(described.target) & set(" \n"):
        return f"={described.target}"
    return None

"""FuseAttention: RoPE, writing to a static cache and attention to it become one bwla.cached_attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.match_graph import TARGETS, calls, dtype_of, match, op, operands, sliced
from bwla_compiler.passes.match_prologue import same_size
from bwla_compiler.runtime.kv_rounding import LARGEST
from bwla_compiler.runtime.ops import LIBRARY

_ATEN: Any = torch.ops.aten
_OPS: Any = getattr(torch.ops, LIBRARY.ns)
_ATTEND = _OPS.attend.default
_BY_TOKEN = [0, 2, 1, 3]
"""Axes of [batch, heads, tokens, size] of [batch, tokens, heads, size], and back."""

_TINY = torch.finfo(torch.float32).tiny
_STEP = op("div", op("amax", op("abs", "x"), check=lambda node: node.args[1:] == ([-1], True)), LARGEST)
_CODES = op("round", op("div", "x", op("clamp_min", "step", _TINY)))

Value = Any
"""A Node whose operands have the types of its target's schema."""

Turn = tuple[Node | None, Node | None]
"""Cosines and sines of RoPE [batch or 1, tokens, size]; none where nothing is turned."""


class Refusal(Exception):
    """Why an attention is left as it is."""


@dataclass(frozen=True)
class _Write:
    """What a graph writes into an input of its own: rows [batch, heads, tokens, ..] from token `start` on."""

    cache: Node
    rows: Node
    start: Node
    edits: tuple[Node, ...]


@dataclass(frozen=True)
class _Kept:
    """Keys or values as attention reads them: floats x [batch, heads, tokens, size], kept as they are or rounded."""

    x: Node
    write: _Write
    scale: _Write | None = None

    def writes(self) -> Iterator[_Write]:
        """Yield what is written."""
        yield self.write
        if self.scale is not None:
            yield self.scale


class FuseAttention:
    """Make one call of what stands between the linears of a step, so that a whole step is one routine.

    Works in place on a functional aten graph after decompositions, behind ReadCodes; nodes need meta "val". The cache
    must be an input of the graph that nothing else reads or edits: the call edits it where the graph made a new one.
    """

    name: ClassVar[str] = "fuse-attention"

    def run(self, graph: Graph) -> PassReport:
        """Rewrite what can be; the report lists each attention, and why one was left."""
        report = PassReport(self.name)
        for node in graph.find_nodes(op="call_function", target=_ATTEND):
            try:
                cache = _fuse(graph, node)
            except Refusal as reason:
                report.skip(node.name, str(reason))
            else:
                report.changed.append((node.name, f"it edits {cache.name}"))
        if report.changed:
            graph.eliminate_dead_code()
            graph.lint()
        return report


def _fuse(graph: Graph, attend: Value) -> Node:
    """Put one call in the place of an attention and what leads to it; return the cache of keys. Raises Refusal."""
    query, keys, values, mask, scale, causal, *scales = operands(attend, False, None, None, given=5)
    on_cpu = query.meta["val"].device == torch.device("cpu")
    if causal or attend.kwargs or not on_cpu or dtype_of(query) != torch.float32:
        raise Refusal("it is no attention in float32 on a CPU, under a mask if any")
    key, value = _kept(attend, keys, scales[0]), _kept(attend, values, scales[1])
    if key.write.start is not value.write.start or _start(key.scale) is not _start(value.scale):
        raise Refusal("its keys and values are kept at different places")
    (query_rows, turn), (key_rows, key_turn) = _unturned(query), _unturned(key.x)
    if turn != key_turn:
        raise Refusal("its queries and keys are turned differently")
    result = _result(attend)
    rows = (query_rows, key_rows, _by_token(value.x))
    caches = (key.write.cache, value.write.cache, key.write.start)
    codes: tuple[Node | None, ...] = (None, None, None)
    if key.scale is not None and value.scale is not None:
        codes = (key.scale.cache, value.scale.cache, key.scale.start)
    with graph.inserting_before(attend):
        call = graph.call_function(_OPS.cached_attention.default, (*rows, *turn, *caches, mask, scale, *codes))
    call.meta = {"val": result.meta["val"]}
    result.replace_all_uses_with(call)
    for node in _until(result, attend):
        graph.erase_node(node)
    for kept in (key, value):
        for write in kept.writes():
            for edit in write.edits:
                graph.erase_node(edit)
    return key.write.cache


def _start(write: _Write | None) -> Node | None:
    return None if write is None else write.start


def _until(node: Value, last: Node) -> Iterator[Node]:
    """Yield a node and those that it is computed of, each from its first operand, up to `last`."""
    while node is not last:
        before = node.args[0]
        yield node
        node = before
    yield last


def _result(attend: Value) -> Node:
    """Return the node that holds the result [batch, tokens, heads * size], the one that reads it. Raises Refusal."""
    node = attend
    for targets, arguments in ((_PERMUTE, (_BY_TOKEN,)), (_VIEWS, None)):
        (user,) = node.users if len(node.users) == 1 else (None,)
        if user is None or user.target not in targets or (arguments and user.args[1:] != arguments):
            raise Refusal("its result is read otherwise than by token")
        node = user
    batch, heads, tokens, size = attend.meta["val"].shape
    shape = node.meta["val"].shape
    if len(shape) != 3 or not all(map(same_size, shape, (batch, tokens, heads * size))):
        raise Refusal("its result is read otherwise than by token")
    found: Node = node
    return found


_PERMUTE = (_ATEN.permute.default,)
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default)


def _kept(attend: Node, cache: Value, scale: Value) -> _Kept:
    """Return how keys or values that attention reads were kept. Raises Refusal."""
    write = _write(attend, cache)
    if scale is None:
        if dtype_of(write.cache) != torch.float32:
            raise Refusal(f"its cache holds {dtype_of(write.cache)}")
        return _Kept(write.rows, write)
    of_scale = _write(attend, scale)
    codes, step = match(_CODES, write.rows), match(_STEP, of_scale.rows)
    if codes is None or step is None or codes.values["step"] is not of_scale.rows:
        raise Refusal("its cache rounds in another way")
    if codes.values["x"] is not step.values["x"] or dtype_of(codes.values["x"]) != torch.float32:
        raise Refusal("its cache rounds in another way")
    return _Kept(codes.values["x"], write, of_scale)


def _write(attend: Node, updated: Value) -> _Write:
    """Return the write that a cache was updated by. Raises Refusal."""
    if updated.target is not _ATEN.index_put.default:
        raise Refusal("its keys or values are not written into a static cache")
    cache, places, rows, *rest = updated.args
    copies = [user for user in updated.users if user is not attend]
    alone = len(copies) == 1 and copies[0].target is _ATEN.copy_.default and copies[0].args == (cache, updated)
    if not alone or copies[0].users or cache.op != "placeholder" or set(cache.users) != {updated, copies[0]}:
        raise Refusal(f"{cache.name} is read or edited by others too")
    held, written = cache.meta["val"].shape, rows.meta["val"].shape
    fits = len(written) == 4 and all(same_size(held[i], written[i]) for i in (0, 1, 3))
    if any(rest) or len(places) != 3 or places[:2] != [None, None] or not fits:
        raise Refusal(f"{cache.name} is not written token by token")
    return _Write(cache, rows, _first(places[2], rows), (copies[0], updated))


def _first(places: Value, rows: Node) -> Node:
    """Return the place of the first token, an int64 [], where those of all rows follow each other. Raises Refusal."""
    if calls(places, *TARGETS["add"]) and not places.kwargs:
        for count, first in (places.args, places.args[::-1]):
            if not calls(count, torch.ops.prims.iota.default) or not isinstance(first, Node):
                continue
            if count.kwargs["start"] != 0 or count.kwargs["step"] != 1:
                continue
            value = first.meta["val"]
            one = value.dim() == 0 and value.dtype == torch.int64
            if one and same_size(count.args[0], rows.meta["val"].shape[2]):
                return first
    raise Refusal("its tokens are not kept one after the other")


def _unturned(x: Value) -> tuple[Node, Turn]:
    """Return rows [batch, tokens, heads, size] before RoPE, and how they are turned to x [batch, heads, tokens, size].

    RoPE as transformers writes it: x * cos + cat(-second half, first half) * sin. Raises Refusal.
    """
    if not calls(x, *TARGETS["add"]):
        return _by_token(x), (None, None)
    for plain, crossed in _orders(x, "add"):
        for source, cos in _orders(plain, "mul"):
            for halves, sin in _orders(crossed, "mul"):
                if _is_crossed(halves, source) and _is_turn(cos, x) and _is_turn(sin, x):
                    return _by_token(source), (cos.args[0], sin.args[0])
    raise Refusal("its queries or keys are added up in a way that is not RoPE by halves")


def _orders(node: Value, name: str) -> Iterator[tuple[Value, Value]]:
    """Yield the two operands of a sum or product, in both orders; nothing of other nodes."""
    if calls(node, *TARGETS[name]) and not node.kwargs:
        a, b = node.args
        yield a, b
        yield b, a


def _is_crossed(node: Value, x: Value) -> bool:
    """Whether a node is cat(-second half of x, first half of x) over the channels."""
    if not calls(node, _ATEN.cat.default) or not isinstance(x, Node):
        return False
    parts, *dim = node.args
    size: Any = x.meta["val"].shape[-1]
    if dim not in ([-1], [3]) or not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return False
    second, first = parts
    negated = calls(second, *TARGETS["neg"]) and sliced(second.args[0]) == (x, size // 2, None)
    return bool(size % 2 == 0 and negated and sliced(first) == (x, 0, size // 2))


def _is_turn(node: Value, x: Node) -> bool:
    """Whether a node is a float32 [batch or 1, tokens, size] that is the same for all heads of x."""
    if not calls(node, _ATEN.unsqueeze.default) or node.args[1] != 1:
        return False
    turn, (batch, _, *rest) = node.args[0].meta["val"], x.meta["val"].shape
    if turn.dim() != 3 or turn.dtype != torch.float32 or not all(map(same_size, turn.shape[1:], rest)):
        return False
    return same_size(turn.shape[0], 1) or same_size(turn.shape[0], batch)


def _by_token(x: Value) -> Node:
    """Return x [batch, heads, tokens, size] as the graph has it by token, before heads went first. Raises Refusal."""
    if x.target is not _ATEN.permute.default or x.args[1] != _BY_TOKEN:
        raise Refusal("its queries, keys or values are no permuted results of linears")
    found: Node = x.args[0]
    return found

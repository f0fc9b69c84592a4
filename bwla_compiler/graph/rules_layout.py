"""Rules of layout: views, permutations, slices, joins, indexing. Numbers move, none changes."""

from typing import Any

import torch

from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.analysis import Analysis, Rule, Value, aligned, argument
from bwla_compiler.graph.rules_lanes import lanes_of, take_lanes
from bwla_compiler.graph.spaces import Freedom, Space, compound, constrain, parts_of, piece, pin, pinned, unify


def same_rule(a: Analysis, node: Any) -> bool:
    """Element for element the same: all but casts to whole numbers, and a dropout that drops."""
    source = node.args[0]
    value = a.value(source)
    if value is None or not a.is_tensor(node):
        return False
    rounds = source.meta["val"].is_floating_point() and not node.meta["val"].is_floating_point()
    drops = node.target is torch.ops.aten.dropout.default and argument(node, 2, "train")
    if rounds or drops:
        a.opaque(node, f"{node.name}: acts on each channel by itself")
    else:
        a.values[node] = Value(list(value.axes), value.squared)
    return True


def negation_rule(a: Analysis, node: Any) -> bool:
    """-x lives where x does."""
    value = a.value(node.args[0])
    if value is None:
        return False
    a.values[node] = Value(list(value.axes))
    return True


def view_rule(a: Analysis, node: Any) -> bool:
    """A split or merge of axes makes Kronecker products; of one with lanes, direct sums."""
    value = a.value(node.args[0])
    if value is None:
        return False
    lanes = lanes_of(a, node, value.axes)
    a.values[node] = lanes or Value(_regroup(value.axes, a.shape(node), node.name), value.squared)
    return True


def _regroup(axes: list[Space], sizes: list[int], reason: str) -> list[Space]:
    """Return the axes of a reshape: runs of equal product are merged into Kronecker products and split again."""
    out: list[Space] = []
    i = j = 0
    while i < len(axes) or j < len(sizes):
        if j < len(sizes) and sizes[j] == 1:
            out.append(pinned(1, reason))
            j += 1
        elif i < len(axes) and axes[i].size == 1:
            i += 1
        else:
            i_end, j_end = _matching_run([x.size for x in axes], sizes, i, j)
            out.extend(_split_product([x for x in axes[i:i_end] if x.size > 1], sizes[j:j_end], reason))
            i, j = i_end, j_end
    return out


def _matching_run(old: list[int], new: list[int], i: int, j: int) -> tuple[int, int]:
    """Return the ends of the shortest runs from i and j with equal products."""
    i_end, j_end, p, q = i + 1, j + 1, old[i], new[j]
    while p != q:
        if p < q:
            p *= old[i_end]
            i_end += 1
        else:
            q *= new[j_end]
            j_end += 1
    return i_end, j_end


def _split_product(old: list[Space], sizes: list[int], reason: str) -> list[Space]:
    merged = compound("product", old)
    wanted = [s for s in sizes if s > 1]
    if len(wanted) == 1:
        found = iter([merged])
    else:
        unify(compound("product", [Space(s) for s in wanted]), merged, reason)
        split = parts_of(merged, "product")
        # finer than the new axes: neighbours go together
        found = iter(split if [p.size for p in split] == wanted else _gather(split, wanted, reason))
    return [next(found) if s > 1 else pinned(1, reason) for s in sizes]


def _gather(split: list[Space], wanted: list[int], reason: str) -> list[Space]:
    out: list[Space] = []
    pending = list(split)
    for size in wanted:
        run: list[Space] = []
        total = 1
        while total < size and pending:
            run.append(pending.pop(0))
            total *= run[-1].size
        if total != size:
            for space in split:
                pin(space, f"{reason}: factors do not line up")
            return [pinned(s, f"{reason}: factors do not line up") for s in wanted]
        out.append(compound("product", run))
    return out


def permute_rule(a: Analysis, node: Any) -> bool:
    """The axes in another order."""
    value = a.value(node.args[0])
    if value is None:
        return False
    rank = len(value.axes)
    if node.target is torch.ops.aten.permute.default:
        order = [int(i) % rank for i in node.args[1]]
    else:
        i, j = node.args[1:3] if len(node.args) > 2 else (0, rank - 1)
        order = list(range(rank))
        order[int(i) % rank], order[int(j) % rank] = int(j) % rank, int(i) % rank
    a.values[node] = Value([value.axes[i] for i in order], value.squared)
    return True


def unsqueeze_rule(a: Analysis, node: Any) -> bool:
    """A new axis of one entry."""
    value = a.value(node.args[0])
    if value is None:
        return False
    at = int(node.args[1]) % (len(value.axes) + 1)
    axes = list(value.axes)
    axes.insert(at, pinned(1, "unsqueeze"))
    a.values[node] = Value(axes, value.squared)
    return True


def squeeze_rule(a: Analysis, node: Any) -> bool:
    """Axes of one entry that go; the others stay in order."""
    value = a.value(node.args[0])
    if value is None:
        return False
    rank = len(value.axes)
    listed = argument(node, 1, "dim", range(rank))
    dims = {int(d) % rank for d in ([listed] if isinstance(listed, int) else listed)}
    a.values[node] = Value([x for i, x in enumerate(value.axes) if i not in dims or x.size > 1])
    return True


def expand_rule(a: Analysis, node: Any) -> bool:
    """The same numbers again along an axis, which is pinned."""
    value = a.value(node.args[0])
    if value is None:
        return False
    a.values[node] = _expanded(value, a.shape(node), node.name)
    return True


def _expanded(value: Value, sizes: list[int], name: str) -> Value:
    axes = aligned(value, len(sizes))
    return Value(
        [x if x.size == s else pinned(s, f"{name}: a repeated axis") for x, s in zip(axes, sizes, strict=True)]
    )


def copy_rule(a: Analysis, node: Any) -> bool:
    """copy(target, source): the source's numbers in the target's shape."""
    value = a.value(node.args[1])
    if value is None:
        return False
    a.values[node] = _expanded(value, a.shape(node), node.name)
    return True


def repeat_rule(a: Analysis, node: Any) -> bool:
    """Copies one after the other: the axis is a product of their number, which is pinned, and itself."""
    value = a.value(node.args[0])
    if value is None:
        return False
    times = [int(t) for t in node.args[1]]
    axes = aligned(value, len(times))
    a.values[node] = Value([_copies(x, t, [pinned(t, "copies"), x]) for x, t in zip(axes, times, strict=True)])
    return True


def interleave_rule(a: Analysis, node: Any) -> bool:
    """Every entry several times in a row: a product of the axis and their number, which is pinned."""
    value = a.value(node.args[0])
    times, dim = node.args[1], argument(node, 2, "dim")
    if value is None or not isinstance(times, int) or dim is None:
        return False
    axes = list(value.axes)
    at = int(dim) % len(axes)
    axes[at] = _copies(axes[at], times, [axes[at], pinned(times, "copies")])
    a.values[node] = Value(axes)
    return True


def _copies(axis: Space, times: int, product: list[Space]) -> Space:
    if times == 1:
        return axis
    return pinned(times, "copies") if axis.size == 1 else compound("product", product)


def cat_rule(a: Analysis, node: Any) -> bool:
    """Joined along an axis: the direct sum there, one space each along the others."""
    tensors = [t for t in node.args[0] if t.meta["val"].numel() > 0]
    known = _joined(a, tensors)
    if not known:
        return False
    at = int(argument(node, 1, "dim", 0)) % len(known[0].axes)
    axes = _unified(known, node.name, skip=at)
    axes[at] = compound("sum", [v.axes[at] for v in known])
    a.values[node] = Value(axes)
    return True


def stack_rule(a: Analysis, node: Any) -> bool:
    """Joined along a new axis, which is pinned; one space each along the others."""
    known = _joined(a, node.args[0])
    if not known:
        return False
    axes = _unified(known, node.name)
    at = int(argument(node, 1, "dim", 0)) % (len(axes) + 1)
    a.values[node] = Value([*axes[:at], pinned(len(known), f"{node.name}: stacked"), *axes[at:]])
    return True


def _joined(a: Analysis, tensors: Any) -> list[Value]:
    """Return what is known of tensors, nothing where it is not known of all."""
    values = [a.value(t) for t in tensors]
    return [v for v in values if v is not None] if all(v is not None for v in values) else []


def _unified(values: list[Value], reason: str, *, skip: int = -1) -> list[Space]:
    """Return axes that tensors share, one of them excepted."""
    axes = list(values[0].axes)
    for value in values[1:]:
        for i, axis in enumerate(value.axes):
            if i != skip:
                unify(axes[i], axis, reason)
    return axes


def pad_rule(a: Analysis, node: Any) -> bool:
    """Zeros before and after an axis stand in pinned spaces of their own; another number is in every other channel."""
    value = a.value(node.args[0])
    padding: Any = argument(node, 1, "pad")
    has_mode = node.target is torch.ops.aten.pad.default
    mode = argument(node, 2, "mode", "constant") if has_mode else "constant"
    number = argument(node, 2 + has_mode, "value") or 0
    if value is None or mode != "constant" or any(p < 0 for p in padding):
        return False
    axes = list(value.axes)
    for i, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        sizes = [s for s in (before, after) if s]
        for other in (x for x in value.axes if number != 0 and sizes and x is not value.axes[-1 - i]):
            constrain(other, Freedom.FIXES_ONES, f"{node.name}: padded with one number in every channel")
        first, last = ([pinned(s, f"{node.name}: padded")] if s else [] for s in (before, after))
        axes[-1 - i] = compound("sum", [*first, value.axes[-1 - i], *last])
    a.values[node] = Value(axes)
    return True


def slice_rule(a: Analysis, node: Any) -> bool:
    """A part of an axis is a part of a direct sum."""
    value = a.value(node.args[0])
    if value is None or take_lanes(a, node):
        return value is not None
    at = int(argument(node, 1, "dim", 0)) % len(value.axes)
    low, high, step = _bounds(node, 2, value.axes[at].size)
    axes = list(value.axes)
    axes[at] = _cut(a, node, axes[at], low, high, step, a.shape(node)[at])
    a.values[node] = Value(axes)
    return True


def _cut(a: Analysis, node: Any, axis: Space, low: int, high: int, step: int, size: int) -> Space:
    if step == 1 and size > 0:
        return piece(axis, low, high, node.name)
    pin(axis, f"{node.name}: a strided slice")
    return pinned(size, f"{node.name}: a strided slice")


def _bounds(node: Any, first: int, size: int) -> tuple[int, int, int]:
    """Return start, end and step of a slice of an axis, in range."""
    step = int(argument(node, first + 2, "step", None) or 1)
    start, end = argument(node, first, "start"), argument(node, first + 1, "end")
    return (*slice(start, end).indices(size)[:2], step)


def slice_scatter_rule(a: Analysis, node: Any) -> bool:
    """A slice replaced by another tensor: the pieces before and after, and the other tensor's between them."""
    target, source = (a.value(x) for x in node.args[:2])
    if target is None or source is None:
        return False
    at = int(argument(node, 2, "dim", 0)) % len(target.axes)
    axis = target.axes[at]
    low, high, step = _bounds(node, 3, axis.size)
    if step != 1 or low >= high:
        return False
    axes = _unified([target, source], node.name, skip=at)
    before = [piece(axis, 0, low, node.name)] if low else []
    after = [piece(axis, high, axis.size, node.name)] if high < axis.size else []
    axes[at] = compound("sum", [*before, source.axes[at], *after])
    a.values[node] = Value(axes)
    return True


def split_rule(a: Analysis, node: Any) -> bool:
    """The parts of an axis are those of a direct sum."""
    value = a.value(node.args[0])
    if value is None:
        return False
    at = int(argument(node, 2, "dim", 0)) % len(value.axes)
    items, offset = [], 0
    for result in node.meta["val"]:
        size = int(result.shape[at])
        axes = list(value.axes)
        axes[at] = piece(axes[at], offset, offset + size, node.name) if size else pinned(0, node.name)
        items.append(Value(axes))
        offset += size
    a.values[node] = Value([], items=items)
    return True


def getitem_rule(a: Analysis, node: Any) -> bool:
    """One of several results."""
    source, index = node.args
    items = a.values[source].items if source in a.values else []
    if not isinstance(index, int) or index >= len(items):
        return False
    a.values[node] = items[index]
    return True


LAYOUT_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    (ops.SAME, same_rule),
    (ops.NEGATION, negation_rule),
    (ops.VIEW, view_rule),
    (ops.PERMUTE, permute_rule),
    (ops.UNSQUEEZE, unsqueeze_rule),
    (ops.SQUEEZE, squeeze_rule),
    (ops.EXPAND, expand_rule),
    (ops.COPY, copy_rule),
    (ops.REPEAT, repeat_rule),
    (ops.INTERLEAVE, interleave_rule),
    (ops.SLICE, slice_rule),
    (ops.SPLIT, split_rule),
    (ops.GETITEM, getitem_rule),
    (ops.CAT, cat_rule),
    (ops.STACK, stack_rule),
    (ops.PAD, pad_rule),
    (ops.SLICE_SCATTER, slice_scatter_rule),
)

"""Rules of layout: views, permutations, slices, joins, indexing. Numbers move, none changes."""

from typing import Any

import torch

from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.analysis import Analysis, Rule, Value, aligned
from bwla_compiler.graph.spaces import Space, compound, parts_of, piece, pin, pinned, unify


def same_rule(a: Analysis, node: Any) -> bool:
    source = node.args[0]
    if source not in a.values:
        return False
    value = a.values[source]
    a.values[node] = Value(list(value.axes), value.squared)
    return True


def negation_rule(a: Analysis, node: Any) -> bool:
    return same_rule(a, node)


def view_rule(a: Analysis, node: Any) -> bool:
    value = a.value(node.args[0])
    if value is None:
        return False
    axes = _regroup(value.axes, a.shape(node), node.name)
    a.values[node] = Value(axes, value.squared)
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
    value = a.value(node.args[0])
    if value is None:
        return False
    at = int(node.args[1]) % (len(value.axes) + 1)
    axes = list(value.axes)
    axes.insert(at, pinned(1, "unsqueeze"))
    a.values[node] = Value(axes, value.squared)
    return True


def expand_rule(a: Analysis, node: Any) -> bool:
    value = a.value(node.args[0])
    if value is None:
        return False
    sizes = a.shape(node)
    axes = aligned(value, len(sizes))
    a.values[node] = Value(
        [x if x.size == s else pinned(s, f"{node.name}: a repeated axis") for x, s in zip(axes, sizes, strict=True)]
    )
    return True


def slice_rule(a: Analysis, node: Any) -> bool:
    value = a.value(node.args[0])
    if value is None:
        return False
    dim, start, end, step = (*node.args[1:], *(None,) * 4)[:4]
    at = int(dim or 0) % len(value.axes)
    size = value.axes[at].size
    low, high = _bounds(start, size, 0), _bounds(end, size, size)
    axes = list(value.axes)
    if step not in (None, 1):
        pin(axes[at], f"{node.name}: a strided slice")
        axes[at] = pinned(a.shape(node)[at], f"{node.name}: a strided slice")
    else:
        axes[at] = piece(axes[at], low, high, node.name)
    a.values[node] = Value(axes, value.squared)
    return True


def _bounds(index: Any, size: int, default: int) -> int:
    if index is None:
        return default
    return max(0, index + size) if index < 0 else min(int(index), size)


def split_rule(a: Analysis, node: Any) -> bool:
    value = a.value(node.args[0])
    if value is None:
        return False
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    at = int(dim) % len(value.axes)
    items, offset = [], 0
    for result in node.meta["val"]:
        size = int(result.shape[at])
        axes = list(value.axes)
        axes[at] = piece(axes[at], offset, offset + size, node.name)
        items.append(Value(axes, value.squared))
        offset += size
    a.values[node] = Value([], items=items)
    return True


def getitem_rule(a: Analysis, node: Any) -> bool:
    source, index = node.args
    items = a.values[source].items if source in a.values else []
    if not isinstance(index, int) or index >= len(items):
        return False
    a.values[node] = items[index]
    return True


def cat_rule(a: Analysis, node: Any) -> bool:
    tensors = [t for t in node.args[0] if t.meta["val"].numel() > 0]
    values = [a.value(t) for t in tensors]
    if not values or any(v is None for v in values):
        return False
    known = [v for v in values if v is not None]
    at = int(node.args[1] if len(node.args) > 1 else 0) % len(known[0].axes)
    axes = list(known[0].axes)
    for value in known[1:]:
        for i, axis in enumerate(value.axes):
            if i != at:
                unify(axes[i], axis, node.name)
    axes[at] = compound("sum", [v.axes[at] for v in known])
    a.values[node] = Value(axes)
    return True


def index_rule(a: Analysis, node: Any) -> bool:
    value = a.value(node.args[0])
    picked = [(i, q) for i, q in enumerate(node.args[1]) if q is not None]
    if value is None or len(picked) != 1:
        return False
    at, index = picked[0]
    a.pin_all(index, f"{node.name}: an index")
    pin(value.axes[at], f"{node.name}: indexed")
    rank = len(a.shape(index))
    rows = [pinned(s, "indexed") for s in a.shape(node)[at : at + rank]]
    a.values[node] = Value([*value.axes[:at], *rows, *value.axes[at + 1 :]])
    return True


def masked_fill_rule(a: Analysis, node: Any) -> bool:
    """Filling with 0 multiplies by a mask: the masked axes are pinned, the others pass."""
    source, mask, fill = node.args[:3]
    value = a.value(source)
    if value is None or fill != 0:
        return False
    sizes = a.shape(mask)
    sizes = [1] * (len(value.axes) - len(sizes)) + sizes
    for axis, size in zip(value.axes, sizes, strict=True):
        if size > 1:
            pin(axis, f"{node.name}: masked")
    a.values[node] = Value(list(value.axes))
    return True


LAYOUT_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    (ops.SAME, same_rule),
    (ops.NEGATION, negation_rule),
    (ops.VIEW, view_rule),
    (ops.PERMUTE, permute_rule),
    (ops.UNSQUEEZE, unsqueeze_rule),
    (ops.EXPAND, expand_rule),
    (ops.SLICE, slice_rule),
    (ops.SPLIT, split_rule),
    (ops.GETITEM, getitem_rule),
    (ops.CAT, cat_rule),
    (ops.INDEX, index_rule),
    (ops.MASKED_FILL, masked_fill_rule),
)

"""Rules of what chooses, masks and fills: entries by number, rows by a mask, constants of another tensor's shape."""

import math
from typing import Any

from torch.fx import Node

from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.analysis import Analysis, Rule, Value, aligned, argument
from bwla_compiler.graph.rules_lanes import take_lanes
from bwla_compiler.graph.spaces import Freedom, Space, constrain, pin, pinned, unify


def index_rule(a: Analysis, node: Any) -> bool:
    """Indexed axes are pinned, the others pass; neighbours give way to the indices' axes, else these come first."""
    value = a.value(node.args[0])
    picked = {i: q for i, q in enumerate(node.args[1]) if q is not None}
    if value is None or not picked:
        return False
    if take_lanes(a, node):
        return True
    for at, index in picked.items():
        a.pin_all(index, f"{node.name}: an index")
        pin(value.axes[at], f"{node.name}: indexed")
    kept = [x for i, x in enumerate(value.axes) if i not in picked]
    first = min(picked) if list(picked) == list(range(min(picked), max(picked) + 1)) else 0
    sizes = a.shape(node)
    rows = [pinned(s, "indexed") for s in sizes[first : first + len(sizes) - len(kept)]]
    a.values[node] = Value([*kept[:first], *rows, *kept[first:]])
    return True


def index_select_rule(a: Analysis, node: Any) -> bool:
    """Entries of an axis by their numbers: that axis is pinned."""
    value = a.value(node.args[0])
    if value is None:
        return False
    at = int(node.args[1]) % len(value.axes)
    pin(value.axes[at], f"{node.name}: indexed")
    a.values[node] = _with_axis(value, at, [pinned(a.shape(node)[at], "indexed")])
    return True


def _with_axis(value: Value, at: int, axes: list[Space]) -> Value:
    return Value([*value.axes[:at], *axes, *value.axes[at + 1 :]])


def select_rule(a: Analysis, node: Any) -> bool:
    """One entry of an axis by its number: the axis is pinned and gone."""
    value = a.value(node.args[0])
    if value is None or take_lanes(a, node):
        return value is not None
    at = int(node.args[1]) % len(value.axes)
    pin(value.axes[at], f"{node.name}: one entry is taken by number")
    a.values[node] = _with_axis(value, at, [])
    return True


def unbind_rule(a: Analysis, node: Any) -> bool:
    """The entries of an axis, one by one: the axis is pinned and gone."""
    value = a.value(node.args[0])
    if value is None:
        return False
    at = int(argument(node, 1, "dim", 0)) % len(value.axes)
    pin(value.axes[at], f"{node.name}: entries are taken by number")
    a.values[node] = Value([], items=[_with_axis(value, at, []) for _ in node.meta["val"]])
    return True


def select_scatter_rule(a: Analysis, node: Any) -> bool:
    """One entry of an axis replaced by another tensor: the axis is pinned, the others are shared."""
    target, source = (a.value(x) for x in node.args[:2])
    if target is None or source is None:
        return False
    at = int(node.args[2]) % len(target.axes)
    pin(target.axes[at], f"{node.name}: one entry is replaced")
    for x, y in zip(_with_axis(target, at, []).axes, source.axes, strict=True):
        unify(x, y, node.name)
    a.values[node] = Value(list(target.axes))
    return True


def along_rule(a: Analysis, node: Any) -> bool:
    """Linear along the axes that it names, which are pinned; the others pass."""
    value = a.value(node.args[0])
    dims = argument(node, 2, "dims", ()) if "roll" in str(node.target) else node.args[1]
    dims = [dims] if isinstance(dims, int) else list(dims)
    if value is None or not dims:
        return False
    for dim in dims:
        pin(value.axes[int(dim)], f"{node.name}: mixes or reorders this axis")
    a.values[node] = Value(list(value.axes))
    return True


def triangle_rule(a: Analysis, node: Any) -> bool:
    """Half of a matrix masked by zeros: its two axes are pinned."""
    value = a.value(node.args[0])
    if value is None:
        return False
    for axis in value.axes[-2:]:
        pin(axis, f"{node.name}: masked")
    a.values[node] = Value(list(value.axes))
    return True


def masked_fill_rule(a: Analysis, node: Any) -> bool:
    """A choice between a tensor and a number."""
    source, mask, fill = node.args[:3]
    return _choose(a, node, mask, fill, source)


def where_rule(a: Analysis, node: Any) -> bool:
    """A choice between two tensors, or a tensor and a number."""
    return _choose(a, node, *node.args[:3])


def _choose(a: Analysis, node: Any, mask: Any, left: Any, right: Any) -> bool:
    """Axes along which a mask varies are pinned; along the others whole vectors are chosen, of one space."""
    sides = [x for x in (left, right) if isinstance(x, Node)]
    if any(a.value(x) is None for x in (mask, *sides)):
        return False
    numbers = [x for x in (left, right) if not isinstance(x, Node)]
    if any(not math.isfinite(x) for x in numbers):
        a.opaque(node, f"{node.name}: masked")
        return True
    a.pin_all(mask, f"{node.name}: a mask")
    sizes = a.shape(node)
    masks = aligned(a.values[mask], len(sizes))
    columns = zip(*(aligned(a.values[x], len(sizes)) for x in sides), strict=True)
    fills = any(x != 0 for x in numbers)
    a.values[node] = Value([_chosen(node, m, list(c), s, fills) for m, c, s in zip(masks, columns, sizes, strict=True)])
    return True


def _chosen(node: Any, mask: Space, operands: list[Space], size: int, fills: bool) -> Space:
    """Return one axis of a choice between operands, and between them and a number where `fills`."""
    full = [x for x in operands if x.size == size]
    for axis in full:
        if mask.size > 1:
            pin(axis, f"{node.name}: masked")
        elif fills or len(full) < len(operands):
            constrain(axis, Freedom.FIXES_ONES, f"{node.name}: one value is put in every channel")
    for axis in full[1:]:
        unify(full[0], axis, node.name)
    return full[0] if full else pinned(size, f"{node.name}: masked")


def fill_rule(a: Analysis, node: Any) -> bool:
    """A constant of another tensor's shape. Zeros are zeros in every basis, and what is empty is yet to be written."""
    if not a.is_tensor(node):
        return False
    if node.target in ops.ZEROS | ops.EMPTY and node.meta["val"].is_floating_point():
        a.values[node] = Value([Space(s) for s in a.shape(node)])
    else:
        a.fresh(node, f"{node.name}: one number in every channel")
    return True


INDEXING_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    (ops.INDEX, index_rule),
    (ops.INDEX_SELECT, index_select_rule),
    (ops.SELECT, select_rule),
    (ops.UNBIND, unbind_rule),
    (ops.SELECT_SCATTER, select_scatter_rule),
    (ops.ALONG, along_rule),
    (ops.TRIANGLE, triangle_rule),
    (ops.MASKED_FILL, masked_fill_rule),
    (ops.WHERE, where_rule),
    (ops.FILL, fill_rule),
)

"""Rules of contractions: linears, matrix products, embeddings, attention."""

from typing import Any

from torch.fx import Node

from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.analysis import Analysis, Rule, Site, Value
from bwla_compiler.graph.spaces import Space, pin, pinned, unify


def linear_rule(a: Analysis, node: Any) -> bool:
    """x W^T + b: reads the last axis of x, writes one of its own."""
    operands = a.linear_operands(node)
    if operands is None:
        return False
    source, weight, bias, transposed = operands
    if source not in a.values:
        return False
    weight_axes = _weight_axes(a, node, weight)
    in_space, out_space = weight_axes if transposed else weight_axes[::-1]
    axes = a.values[source].axes
    unify(axes[-1], in_space, node.name)
    if isinstance(bias, Node):
        unify(a.values[bias].axes[-1], out_space, node.name)
    a.values[node] = Value([*axes[:-1], out_space])
    _record_site(a, node, source, weight, bias, [in_space, out_space])
    return True


def _weight_axes(a: Analysis, node: Any, weight: Any) -> list[Space]:
    """Axes of a linear's weight. A tensor that is also an embedding counts as two: the linear's copy is fresh."""
    name = a.parameter_of(weight)
    if name is None or name not in a.embedded:
        return a.values[weight].axes
    own = f"{name}@{node.name}"
    a.tied[own] = name
    stored = a.parameters[name].axes
    a.parameters[own] = Value([Space(axis.size) for axis in stored])
    order = [_position(stored, axis) for axis in a.values[weight].axes]
    return [a.parameters[own].axes[i] for i in order if i is not None]


def _record_site(
    a: Analysis, node: Any, source: Any, weight: Any, bias: Any, spaces: list[Space], *, offsets: Any = None
) -> None:
    """Note a linear whose weight is a parameter; spaces: of its input and output, axes of the weight as used."""
    name = a.parameter_of(weight)
    if name is None:
        return
    own = f"{name}@{node.name}"
    own = own if own in a.tied else name
    in_axis, out_axis = (_position(a.parameters[own].axes, space) for space in spaces)
    if in_axis is None or out_axis is None:
        return
    bias_name = a.parameter_of(bias) if isinstance(bias, Node) else None
    shape = a.shape(weight)
    a.sites[node] = Site(
        node,
        source,
        own,
        bias_name,
        in_axis,
        out_axis,
        n_experts=shape[0] if len(shape) == 3 else 0,
        offsets=offsets,
    )


def _position(axes: list[Space], space: Space) -> int | None:
    """Return where a space stands among a parameter's axes; the very object, since others may be unified with it."""
    return next((i for i, axis in enumerate(axes) if axis is space), None)


def grouped_rule(a: Analysis, node: Any) -> bool:
    """Rows sorted by expert, each times its expert's matrix: a linear with an axis of experts."""
    operands = a.linear_operands(node)
    if operands is None or operands[0] not in a.values:
        return False
    source, weight = operands[:2]
    value, axes = a.values[source], a.values[weight].axes
    pin(axes[0], f"{node.name}: experts are chosen by number")
    pin(value.axes[0], f"{node.name}: rows go to experts")
    unify(value.axes[1], axes[1], node.name)
    a.values[node] = Value([value.axes[0], axes[2]])
    offsets = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
    _record_site(a, node, source, weight, None, axes[1:], offsets=offsets)
    return True


def matmul_rule(a: Analysis, node: Any) -> bool:
    """x W is a linear; of two activations the axis summed over is one basis, and the batch is pinned."""
    if a.linear_operands(node) is not None:
        return linear_rule(a, node)
    left, right = (a.value(x) for x in node.args[:2])
    if left is None or right is None or len(left.axes) != len(right.axes) or len(left.axes) < 2:
        return False
    for axis in (*left.axes[:-2], *right.axes[:-2]):
        pin(axis, f"{node.name}: batch of a matrix product")
    unify(left.axes[-1], right.axes[-2], node.name)
    a.values[node] = Value([*left.axes[:-1], right.axes[-1]])
    if len(right.axes) == 3 and a.is_constant(node.args[1]):
        _record_site(a, node, node.args[0], node.args[1], None, right.axes[1:])
    return True


def embedding_rule(a: Analysis, node: Any) -> bool:
    """Rows of a table: the last axis is the table's own."""
    weight, ids = node.args[:2]
    value = a.value(weight)
    if value is None or len(value.axes) != 2:
        return False
    pin(value.axes[0], f"{node.name}: rows are looked up by id")
    rows = [pinned(s, "token positions") for s in a.shape(ids)]
    a.values[node] = Value([*rows, value.axes[1]])
    if (name := a.parameter_of(weight)) is not None:
        a.embeddings[node] = name
    return True


def attention_rule(a: Analysis, node: Any) -> bool:
    """softmax(q k^T) v: q and k share one basis, the result is in v's."""
    if any(x not in a.values for x in node.args[:3]) or node.kwargs.get("enable_gqa"):
        return False
    q, k, v = (a.values[x].axes for x in node.args[:3])
    for axis in (*q[:-1], *k[:-1], *v[:-1]):
        pin(axis, f"{node.name}: attention works head by head")
    unify(q[-1], k[-1], node.name)
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if isinstance(mask, Node):
        a.pin_all(mask, f"{node.name}: attention mask")
    a.values[node] = Value([*q[:-1], v[-1]])
    return True


CONTRACTION_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    (ops.LINEAR | ops.ADDMM, linear_rule),
    (ops.MATMUL, matmul_rule),
    (ops.GROUPED, grouped_rule),
    (ops.EMBEDDING, embedding_rule),
    (ops.ATTENTION, attention_rule),
)

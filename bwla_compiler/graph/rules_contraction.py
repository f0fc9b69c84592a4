"""Rules of contractions: linears, matrix products, embeddings, attention."""

from typing import Any

from torch.fx import Node

from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.analysis import Analysis, Rule, Site, Value, aligned, argument
from bwla_compiler.graph.spaces import Freedom, Space, constrain, pin, pinned, unify


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
    result = [*axes[:-1], out_space]
    if isinstance(bias, Node) and not unify_shapes(a.value(bias), result, node.name):
        return False
    a.values[node] = Value(result)
    _record_site(a, node, source, weight, bias, [in_space, out_space])
    return True


def unify_shapes(value: Value | None, result: list[Space], reason: str) -> bool:
    """Add a tensor to a result: the same spaces, and where it has one entry for all, it is added to every channel."""
    if value is None:
        return False
    for x, y in zip(aligned(value, len(result)), result, strict=True):
        if x.size == y.size:
            unify(x, y, reason)
        else:
            constrain(y, Freedom.FIXES_ONES, f"{reason}: one value is added to every channel")
    return True


def _weight_axes(a: Analysis, node: Any, weight: Any) -> list[Space]:
    """Axes of a linear's weight. A tensor that is also an embedding counts as two: the linears' copy is its own."""
    name = a.parameter_of(weight)
    if name is None or name not in a.embedded or not a.may_untie(name):
        return a.values[weight].axes
    own = f"{name}@linear"
    a.tied[own] = name
    stored = a.parameters[name].axes
    if own not in a.parameters:
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
    own = f"{name}@linear" if f"{name}@linear" in a.tied else name
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
    result = _product(a, node, *node.args[:2])
    if result is None:
        return False
    a.values[node] = Value(result)
    experts = a.value(node.args[1])
    if experts is not None and len(experts.axes) == 3 and a.is_constant(node.args[1]):
        _record_site(a, node, node.args[0], node.args[1], None, experts.axes[1:])
    return True


def _product(a: Analysis, node: Any, left: Any, right: Any) -> list[Space] | None:
    """Return the axes of a matrix product of two activations, or None where their axes are not known."""
    x, y = a.value(left), a.value(right)
    if x is None or y is None or len(x.axes) != len(y.axes) or len(x.axes) < 2:
        return None
    reason = f"{node.name}: batch of a matrix product"
    for axis in (*x.axes[:-2], *y.axes[:-2]):
        pin(axis, reason)
    unify(x.axes[-1], y.axes[-2], node.name)
    return [*(pinned(s, reason) for s in a.shape(node)[:-2]), x.axes[-2], y.axes[-1]]


def baddbmm_rule(a: Analysis, node: Any) -> bool:
    """c + x y: a matrix product, and a sum."""
    result = _product(a, node, *node.args[1:3])
    if result is None or not unify_shapes(a.value(node.args[0]), result, node.name):
        return False
    a.values[node] = Value(result)
    return True


def einsum_rule(a: Analysis, node: Any) -> bool:
    """A letter of both operands is contracted, or a batch if it stays; a letter of one passes, or is summed over."""
    inputs, _, output = node.args[0].replace(" ", "").partition("->")
    terms, values = inputs.split(","), [a.value(x) for x in node.args[1]]
    plain = all(letters.isalpha() and len(set(letters)) == len(letters) for letters in (*terms, output))
    if len(terms) != 2 or not plain or any(v is None for v in values):
        return False
    left, right = (dict(zip(t, v.axes, strict=True)) for t, v in zip(terms, values, strict=True) if v is not None)
    for letter in {**left, **right}:
        shared = [axes[letter] for axes in (left, right) if letter in axes]
        if len(shared) == 2 and letter in output:
            for axis in shared:
                pin(axis, f"{node.name}: batch of a product")
        elif len(shared) == 2:
            unify(shared[0], shared[1], node.name)
        elif letter not in output:
            constrain(shared[0], Freedom.FIXES_ONES, f"{node.name}: a sum over channels")
    a.values[node] = Value([(left | right)[letter] for letter in output])
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
    """softmax(q k^T) v: q and k share one basis, the result is in v's. Heads are pinned, grouped ones too."""
    if any(x not in a.values for x in node.args[:3]):
        return False
    q, k, v = (a.values[x].axes for x in node.args[:3])
    reason = f"{node.name}: attention works head by head"
    for axis in (*q[:-1], *k[:-1], *v[:-1]):
        pin(axis, reason)
    unify(q[-1], k[-1], node.name)
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node):
        a.pin_all(mask, f"{node.name}: attention mask")
    a.values[node] = Value([*(pinned(s, reason) for s in a.shape(node)[:-1]), v[-1]])
    return True


CONTRACTION_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    (ops.LINEAR | ops.ADDMM, linear_rule),
    (ops.MATMUL, matmul_rule),
    (ops.BADDBMM, baddbmm_rule),
    (ops.EINSUM, einsum_rule),
    (ops.GROUPED, grouped_rule),
    (ops.EMBEDDING, embedding_rule),
    (ops.ATTENTION, attention_rule),
)

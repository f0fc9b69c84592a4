"""Rules of arithmetic: sums, products, squares, means, norms, pointwise functions."""

from typing import Any

from torch.fx import Node

from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.analysis import Absorption, Analysis, Rule, Value, aligned, argument
from bwla_compiler.graph.spaces import Freedom, Space, constrain, pin, pinned, unify


def sum_rule(a: Analysis, node: Any) -> bool:
    """x + y: equal spaces. Along a broadcast axis, c is added to every channel: c * ones, kept by R ones = ones."""
    rank = len(a.shape(node))
    left, right = (_operand_axes(a, x, rank) for x in node.args[:2])
    if left is None or right is None:
        return False
    out = []
    for x, y in zip(left, right, strict=True):
        if x.size == y.size:
            unify(x, y, node.name)
            out.append(x)
        else:
            wide = x if x.size > 1 else y
            constrain(wide, Freedom.FIXES_ONES, f"{node.name}: one value is added to every channel")
            out.append(wide)
    a.values[node] = Value(out)
    return True


def _operand_axes(a: Analysis, operand: Any, rank: int) -> list[Space] | None:
    """Axes of a tensor operand, or of a number (all broadcast)."""
    if not isinstance(operand, Node):
        return [pinned(1, "number")] * rank
    if operand not in a.values or not a.is_tensor(operand):
        return None
    return aligned(a.values[operand], rank)


def product_rule(a: Analysis, node: Any) -> bool:
    """x * y: pinned where both vary; a size-1 axis scales the whole vector and passes; a gain may be absorbed."""
    rank = len(a.shape(node))
    left, right = (_operand_axes(a, x, rank) for x in node.args[:2])
    if left is None or right is None:
        return False
    if _absorb_gain(a, node):
        return True
    if node.args[0] is node.args[1] and node.target not in ops.DIVISION:
        a.values[node] = Value(left, squared=True)
        return True
    divides = node.target in ops.DIVISION
    reason = f"{node.name}: multiplied channel by channel"
    out = []
    for x, y in zip(left, right, strict=True):
        if x.size == y.size:
            if x.size > 1:
                pin(x, reason)
                pin(y, reason)
            out.append(x)
        else:
            wide = x if x.size > 1 else y
            if divides and wide is y:
                pin(wide, f"{node.name}: a reciprocal")
            out.append(wide)
    a.values[node] = Value(out)
    return True


def _absorb_gain(a: Analysis, node: Any) -> bool:
    """Handle x * gain where the gain can move into the linears that read the product."""
    if node.target in ops.DIVISION:
        return False
    x, gain = node.args[:2]
    if a.is_constant(x):
        x, gain = gain, x
    if a.is_constant(x) or not isinstance(gain, Node) or not isinstance(x, Node):
        return False
    sizes = a.shape(gain)
    if not sizes or sizes[-1] == 1 or any(s != 1 for s in sizes[:-1]) or len(sizes) > len(a.shape(x)):
        return False
    if sizes[-1] != a.shape(x)[-1]:
        return False
    parameter = a.gain_parameter(gain)
    if parameter is None:
        return False
    readers = a.linear_readers(node)
    if isinstance(readers, str):
        a.kept.append((parameter[0], f"{node.name}: {readers}{_of_a_sum(node)}"))
        return False
    a.pin_all(gain, f"{node.name}: a gain")
    a.absorptions.append(Absorption(node, x, parameter[0], parameter[1], None, readers))
    a.values[node] = Value(list(a.values[x].axes))
    return True


def _of_a_sum(node: Any) -> str:
    """Return what is to be said of a gain that feeds a sum, as one after a sublayer does; "" for others.

    R diag(g) is no diag(g') R, and before the norm the gain would change what the norm divides by. The product can
    be rotated online instead, which takes a transform for each such gain and spares one for each group of readers:
    two against two in a layer of Gemma or OLMo-2, and the readers' are fitted to their weights.
    """
    feeds = any(user.target in ops.SUM for user in node.users)
    return "; to rotate it online takes as many transforms as its readers do" if feeds else ""


def power_rule(a: Analysis, node: Any) -> bool:
    """x^2 keeps its bases until a mean over the whole axis shows that only the length of x counts; x^k pins."""
    value = a.value(node.args[0])
    exponent = node.args[1] if len(node.args) > 1 else 2
    if value is None:
        return False
    if exponent != 2:
        a.opaque(node, f"{node.name}: acts on each channel by itself")
        return True
    a.values[node] = Value(list(value.axes), squared=True)
    return True


def reduction_rule(a: Analysis, node: Any) -> bool:
    """A mean of squares over the last axis is invariant (RMS); a plain sum or mean needs R ones = ones."""
    value = a.value(node.args[0])
    if value is None or not value.axes:
        return False
    rank = len(value.axes)
    dims, keep = _dims(node, 1, rank), bool(argument(node, 2, "keepdim", False))
    for i in dims:
        if not (value.squared and dims == {rank - 1}):
            freedom = Freedom.PINNED if value.squared else Freedom.FIXES_ONES
            constrain(value.axes[i], freedom, f"{node.name}: a mean or sum over channels")
    if value.squared:
        _pin_others(value, dims, f"{node.name}: squares kept apart")
    a.values[node] = _reduced(value, dims, keep)
    return True


def _dims(node: Any, index: int, rank: int) -> set[int]:
    """Return the axes that a reduction names, all where it names none."""
    listed = argument(node, index, "dim")
    listed = [listed] if isinstance(listed, int) else listed
    return {int(d) % rank for d in (listed or range(rank))}


def _pin_others(value: Value, dims: set[int], reason: str) -> None:
    for i, axis in enumerate(value.axes):
        if i not in dims:
            pin(axis, reason)


def _reduced(value: Value, dims: set[int], keep: bool) -> Value:
    axes = [pinned(1, "reduced") if i in dims else axis for i, axis in enumerate(value.axes)]
    return Value([axis for i, axis in enumerate(axes) if keep or i not in dims])


def length_rule(a: Analysis, node: Any) -> bool:
    """The length of vectors along the last axis is invariant."""
    value = a.value(node.args[0])
    order = argument(node, 1, "ord" if "linalg" in str(node.target) else "p", 2)
    if value is None or not value.axes:
        return False
    rank = len(value.axes)
    dims = _dims(node, 2, rank)
    if order not in (2, None) or dims != {rank - 1}:
        a.opaque(node, f"{node.name}: acts on each channel by itself")
        return True
    _pin_others(value, dims, f"{node.name}: lengths kept apart")
    a.values[node] = _reduced(value, dims, bool(argument(node, 3, "keepdim", False)))
    return True


def variance_rule(a: Analysis, node: Any) -> bool:
    """The variance along the last axis is the length of what a mean leaves: R ones = ones keeps both."""
    value = a.value(node.args[0])
    if value is None or not value.axes:
        return False
    rank = len(value.axes)
    dims = _dims(node, 1, rank)
    if dims != {rank - 1}:
        a.opaque(node, f"{node.name}: acts on each channel by itself")
        return True
    constrain(value.axes[-1], Freedom.FIXES_ONES, f"{node.name}: a variance over channels")
    _pin_others(value, dims, f"{node.name}: variances kept apart")
    a.values[node] = _reduced(value, dims, bool(argument(node, 3, "keepdim", False)))
    return True


def norm_rule(a: Analysis, node: Any) -> bool:
    """LayerNorm commutes with every R that keeps ones, RMSNorm with every R, once the affine part has moved."""
    x, normalized, gain, shift = (*node.args, None, None)[:4]
    if node.target in ops.RMS_NORM:
        shift = None
    value = a.value(x)
    if value is None or len(normalized) != 1:
        return False
    axis = value.axes[-1]
    if node.target in ops.LAYER_NORM:
        constrain(axis, Freedom.FIXES_ONES, f"{node.name}: LayerNorm subtracts the mean")
    a.values[node] = Value(list(value.axes))
    if gain is None and shift is None:
        return True
    for affine in (gain, shift):
        if isinstance(affine, Node):
            a.pin_all(affine, f"{node.name}: gain or shift of a norm")
    refusal = _absorb_affine(a, node, x, gain, shift)
    if refusal:
        name = next((p for g in (gain, shift) if isinstance(g, Node) and (p := a.parameter_of(g))), node.name)
        a.kept.append((name, refusal))
        pin(axis, f"{node.name}: its gain stays ({refusal})")
    return True


def _absorb_affine(a: Analysis, node: Any, x: Any, gain: Any, shift: Any) -> str:
    """Record that a norm's affine part moves into its readers; return why it cannot, or ""."""
    readers = a.linear_readers(node)
    if isinstance(readers, str):
        return readers
    if isinstance(shift, Node) and (refusal := a.without_bias(readers)):
        return refusal
    gain_of = a.gain_parameter(gain) if isinstance(gain, Node) else (None, 0.0)
    shift_of = a.gain_parameter(shift) if isinstance(shift, Node) else (None, 0.0)
    if gain_of is None or shift_of is None:
        return "gain or shift is not a parameter of its own"
    a.absorptions.append(Absorption(node, x, gain_of[0], gain_of[1], shift_of[0], readers))
    return ""


def pinning_rule(reason: str) -> Rule:
    """Return the rule of operations that only the identity commutes with."""

    def rule(a: Analysis, node: Any) -> bool:
        a.opaque(node, f"{node.name}: {reason}")
        return True

    return rule


ARITHMETIC_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    (ops.SUM, sum_rule),
    (ops.PRODUCT, product_rule),
    (ops.POWER, power_rule),
    (ops.REDUCTION, reduction_rule),
    (ops.LENGTH, length_rule),
    (ops.VARIANCE, variance_rule),
    (ops.LAYER_NORM | ops.RMS_NORM, norm_rule),
    *((targets, pinning_rule(reason)) for targets, reason in ops.PINNING),
)

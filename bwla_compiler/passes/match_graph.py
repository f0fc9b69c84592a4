"""Structural patterns over functional aten graphs: expressions are data, and dtype conversions are looked through.

A pattern is a name (binds a node; the same name again must be the same node), a number, `ANY_NUMBER` names a
constant, `Op` a call, and `OneOf` alternatives. add and mul are tried in both orders.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

_ATEN: Any = torch.ops.aten
_PRIMS: Any = torch.ops.prims

TARGETS: dict[str, tuple[Any, ...]] = {
    "abs": (_ATEN.abs.default,),
    "add": (_ATEN.add.Tensor, _ATEN.add.Scalar),
    "amax": (_ATEN.amax.default,),
    "clamp_min": (_ATEN.clamp_min.default,),
    "div": (_ATEN.div.Tensor,),
    "erf": (_ATEN.erf.default,),
    "exp": (_ATEN.exp.default,),
    "mean": (_ATEN.mean.dim,),
    "mul": (_ATEN.mul.Tensor, _ATEN.mul.Scalar),
    "neg": (_ATEN.neg.default,),
    "pow": (_ATEN.pow.Tensor_Scalar,),
    "relu": (_ATEN.relu.default,),
    "round": (_ATEN.round.default,),
    "rsqrt": (_ATEN.rsqrt.default,),
    "sigmoid": (_ATEN.sigmoid.default,),
    "silu": (_ATEN.silu.default,),
    "sub": (_ATEN.sub.Tensor,),
    "tanh": (_ATEN.tanh.default,),
    "var_mean": (_ATEN.var_mean.correction,),
}
COMMUTATIVE = ("add", "mul")


@dataclass(frozen=True)
class Op:
    """A call of TARGETS[name] with these first operands; `check` judges the node's further arguments."""

    name: str
    operands: tuple[Any, ...]
    check: Callable[[Node], bool] | None = None


@dataclass(frozen=True)
class OneOf:
    """The first alternative that matches."""

    patterns: tuple[Any, ...]


@dataclass(frozen=True)
class Number:
    """A constant, bound to this name."""

    name: str


@dataclass
class Binding:
    """What a pattern found: nodes and numbers by name, and every dtype met on the way."""

    values: dict[str, Any] = field(default_factory=dict)
    dtypes: set[torch.dtype] = field(default_factory=set)

    def copy(self) -> "Binding":
        """Return a copy to try an alternative on."""
        return Binding(dict(self.values), set(self.dtypes))


def op(name: str, *operands: Any, check: Callable[[Node], bool] | None = None) -> Op:
    """Return the pattern of a call."""
    return Op(name, operands, check)


def dtype_of(node: Node) -> torch.dtype | None:
    """Return the dtype of a node's tensor, None where it has none."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def calls(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of these."""
    return isinstance(node, Node) and node.target in targets


def operands(node: Any, *defaults: Any, given: int) -> list[Any]:
    """Return all operands of a call: those that must be given, and then what defaults there are, given or not."""
    found = list(node.args)
    return found + list(defaults[len(found) - given :])


def sliced(node: Any) -> tuple[Any, int, int | None] | None:
    """Return (x, first, end) where a node is x[..., first:end] over the last axis; end None for all. Else None."""
    if not calls(node, _ATEN.slice.Tensor) or node.kwargs:
        return None
    x, dim, first, end, step = operands(node, 0, 0, None, 1, given=1)
    axes = x.meta["val"].dim()
    if dim not in (-1, axes - 1) or step != 1 or not isinstance(first, int) or first < 0:
        return None
    return x, first, end if isinstance(end, int) and end < x.meta["val"].shape[-1] else None


def is_cast(node: Any) -> bool:
    """Whether a node converts a dtype and does nothing else."""
    return isinstance(node, Node) and node.target is _PRIMS.convert_element_type.default


def uncast(node: Any, dtypes: set[torch.dtype] | None = None) -> Any:
    """Return the value behind conversions of dtype; the dtypes between are added to `dtypes`."""
    while is_cast(node):
        if dtypes is not None and (found := dtype_of(node)) is not None:
            dtypes.add(found)
        node = node.args[0]
    return node


def widened_from(node: Node) -> Node:
    """Return the bfloat16 or float16 value that `node` holds as float32, else the node itself."""
    if is_cast(node) and dtype_of(node) == torch.float32:
        source = node.args[0]
        if isinstance(source, Node) and dtype_of(source) in (torch.bfloat16, torch.float16):
            return source
    return node


def match(pattern: Any, value: Any, bound: Binding | None = None) -> Binding | None:
    """Return what the pattern binds when it is `value` (a node or a constant), None where it is not."""
    bound = Binding() if bound is None else bound
    match pattern:
        case OneOf():
            found = (match(one, value, bound.copy()) for one in pattern.patterns)
            return next((f for f in found if f is not None), None)
        case Number():
            return _bind(bound, pattern.name, value) if isinstance(value, (int, float)) else None
        case int() | float():
            close = isinstance(value, (int, float)) and math.isclose(value, pattern, rel_tol=1e-6)
            return bound if close else None
        case str():
            value = uncast(value, bound.dtypes)
            return _bind(bound, pattern, value) if isinstance(value, Node) else None
        case Op():
            return _match_call(pattern, value, bound)
    raise AssertionError(f"{pattern!r} is no pattern")


def _bind(bound: Binding, name: str, value: Any) -> Binding | None:
    if name in bound.values and bound.values[name] is not value:
        return None
    bound.values[name] = value
    return bound


def _match_call(pattern: Op, value: Any, bound: Binding) -> Binding | None:
    node = uncast(value, bound.dtypes)
    if not isinstance(node, Node) or node.target not in TARGETS[pattern.name]:
        return None
    if pattern.check is None:
        if node.kwargs or len(node.args) != len(pattern.operands):
            return None
    elif not pattern.check(node):
        return None
    if (dtype := dtype_of(node)) is not None:
        bound.dtypes.add(dtype)
    orders = [tuple(node.args)]
    if pattern.name in COMMUTATIVE:
        orders.append((node.args[1], node.args[0]))
    for order in orders:
        found: Binding | None = bound.copy()
        for operand, argument in zip(pattern.operands, order, strict=False):
            found = None if found is None else match(operand, argument, found)
        if found is not None:
            return found
    return None

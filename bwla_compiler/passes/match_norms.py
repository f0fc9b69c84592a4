"""RMSNorm and LayerNorm as they look after decomposition, with or without gain and shift."""

from typing import Any

from torch import Tensor
from torch.fx import Node

from bwla_compiler.passes.match_graph import TARGETS, Binding, Number, match, op, uncast, widened_from
from bwla_compiler.passes.match_prologue import Found


def _over_last(node: Node) -> bool:
    """Whether a mean runs over the last dimension alone, and keeps it."""
    value = _value(node.args[0])
    return value is not None and len(node.args) == 3 and _is_last(node.args[1], value) and node.args[2] is True


def _is_last(dims: Any, value: Tensor) -> bool:
    return isinstance(dims, (list, tuple)) and list(dims) in ([-1], [value.dim() - 1])


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


SQUARES = (op("pow", "x", 2), op("mul", "x", "x"))
RMS = tuple(
    op("mul", "x", op("rsqrt", op("add", op("mean", square, check=_over_last), Number("eps")))) for square in SQUARES
)
LAYER = op("mul", op("sub", "x", "mean"), op("rsqrt", op("add", "variance", Number("eps"))))


def match_norm(node: Node) -> Found | None:
    """Return the norm that ends in this node, or None."""
    shift, inner = _channels(node, "add")
    gain, core = _channels(inner, "mul")
    for candidate, has_gain, has_shift in ((core, gain, shift), (inner, None, shift), (node, None, None)):
        found = _match_core(candidate)
        if found is None:
            continue
        kind, bound = found
        for value in (node, inner, core):
            uncast(value, bound.dtypes)
        operands = {"gain": has_gain, "shift": has_shift}
        eps = float(bound.values["eps"])
        return Found(kind, bound.values["x"], bound.dtypes, eps=eps, **operands) if eps > 0 else None
    return None


def _channels(value: Any, name: str) -> tuple[Node | None, Any]:
    """Return (vector, rest) of rest + vector or rest * vector, the vector an entry a channel; else (None, value)."""
    node = uncast(value)
    if isinstance(node, Node) and node.target in TARGETS[name] and not node.kwargs and len(node.args) == 2:
        whole = _value(node)
        for vector, rest in (node.args, node.args[::-1]):
            channel = _value(vector)
            if whole is None or channel is None or channel.dim() != 1 or _value(rest) is None:
                continue
            if channel.shape[0] == whole.shape[-1] and channel.is_floating_point():
                assert isinstance(vector, Node)
                return widened_from(vector), rest
    return None, value


def _match_core(value: Any) -> tuple[str, Binding] | None:
    for pattern in RMS:
        if (bound := match(pattern, value)) is not None:
            return "rms_norm", bound
    bound = match(LAYER, value)
    if bound is not None and _are_moments(bound):
        return "layer_norm", bound
    return None


def _are_moments(bound: Binding) -> bool:
    """Whether mean and variance are both results of one var_mean of x over the last dimension."""
    variance, mean, x = (bound.values[name] for name in ("variance", "mean", "x"))
    source = variance.args[0] if variance.args else None
    if not (isinstance(source, Node) and source.target in TARGETS["var_mean"] and mean.args and mean.args[0] is source):
        return False
    if (variance.args[1:], mean.args[1:]) != ((0,), (1,)) or uncast(source.args[0], bound.dtypes) is not x:
        return False
    value = _value(source.args[0])
    asked = source.kwargs.get("correction"), source.kwargs.get("keepdim")
    return value is not None and len(source.args) == 2 and _is_last(source.args[1], value) and asked == (0, True)

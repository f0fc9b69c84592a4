"""Activation functions as they look after decomposition, alone or times a gate."""

from typing import Any

import torch
from torch.fx import Node

from bwla_compiler.passes.match_graph import TARGETS, Binding, OneOf, dtype_of, match, op, uncast
from bwla_compiler.passes.match_prologue import Found, match_call, same_shape

_CUBE = OneOf((op("pow", "x", 3), op("mul", op("mul", "x", "x"), "x")))
_TANH = op("tanh", op("mul", op("add", "x", op("mul", _CUBE, 0.044715)), 0.7978845608028654))

ACTIVATIONS: dict[str, Any] = {
    "silu": OneOf(
        (
            op("div", "x", op("add", op("exp", op("neg", "x")), 1)),
            op("mul", "x", op("sigmoid", "x")),
            op("silu", "x"),
        )
    ),
    "gelu": op("mul", op("mul", "x", 0.5), op("add", op("erf", op("mul", "x", 0.7071067811865476)), 1)),
    "gelu_tanh": op("mul", op("mul", "x", 0.5), op("add", _TANH, 1)),
    "relu": OneOf((op("relu", "x"), op("clamp_min", "x", 0))),
}


def match_activation(node: Node) -> Found | None:
    """Return the activation function, or the gated one, that ends in this node, or None."""
    if (plain := _match_plain(node)) is not None:
        return Found(plain[0], plain[1].values["x"], plain[1].dtypes)
    dtypes: set[torch.dtype] = set()
    product = uncast(node, dtypes)
    if not isinstance(product, Node) or product.target not in TARGETS["mul"] or len(product.args) != 2:
        return None
    for inner, gate in (product.args, product.args[::-1]):
        found = _match_plain(inner)
        if found is None or found[0] == "relu" or not isinstance(gate, Node):
            continue
        kind, bound = found
        x, gate = bound.values["x"], uncast(gate, bound.dtypes)
        if same_shape(x, gate) and dtype_of(x) == dtype_of(gate):
            met = bound.dtypes | dtypes | ({dtype} if (dtype := dtype_of(product)) else set())
            return Found(f"{kind}_mul", x, met, gate=gate)
    return None


def _match_plain(value: Any) -> tuple[str, Binding] | None:
    for kind, pattern in ACTIVATIONS.items():
        if (bound := match(pattern, value)) is not None:
            return kind, bound
    called = match_call(value)
    if called is None or called.kind not in ACTIVATIONS:
        return None
    return called.kind, Binding({"x": called.x}, called.dtypes)

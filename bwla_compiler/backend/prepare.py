"""Deriving, when a graph is compiled, all that its GPU kernels read in place of stored tensors.

At run time nothing is then packed, decoded or asked of the device, so that a CUDA graph can be recorded: what were
derived during a recording would live in the graph's own memory, and a question would wait for the device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bwla_compiler.runtime import on_triton
from bwla_compiler.runtime.checks import maybe_values
from bwla_compiler.runtime.ops import LIBRARY
from bwla_compiler.runtime.triton_layout import exact_in_tf32, float32, packed_scale, packed_signs

_OPS: Any = getattr(torch.ops, LIBRARY.ns)


def prepare(gm: GraphModule, example_inputs: Sequence[Any]) -> int:
    """Derive what the operators of a graph read, where Triton serves them; return for how many operators.

    gm: as it comes from torch.compile, with its inputs: the tensors that it will be called with.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    known = dict(zip(placeholders, example_inputs, strict=False))
    return sum(_derive(target, arguments) for target, arguments in _calls(gm, known))


def _calls(gm: GraphModule, known: Mapping[Node, Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield (operator, its arguments as values, None for what only running the graph gives)."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _DERIVED:
            yield node.target, [_value(gm, known, argument) for argument in node.args]


def _value(gm: GraphModule, known: Mapping[Node, Any], argument: Any) -> Any:
    if not isinstance(argument, Node):
        return argument
    if argument.op == "get_attr":
        owner, _, name = str(argument.target).rpartition(".")
        return getattr(gm.get_submodule(owner), name)
    return known.get(argument)


def _derive(target: Any, arguments: Sequence[Any]) -> bool:
    padded = [*arguments, *(None,) * (_MOST - len(arguments))]
    stored = next((a for a in padded[1:] if isinstance(a, Tensor)), None)
    if stored is None or type(stored) not in (Tensor, torch.nn.Parameter) or not on_triton.serves(stored):
        return False
    _DERIVED[target](padded)
    return True


def _of_linear(a: Sequence[Any]) -> None:
    scale, _, rank_scale = (maybe_values(a[i], a[j]) for i, j in ((2, 9), (3, 10), (6, 11)))
    packed_signs(a[1], 8 * a[1].shape[2])  # groups are whole bytes: the padded columns are the same
    assert scale is not None
    packed_scale(scale)
    for vector in (rank_scale, a[7]):
        if vector is not None:
            float32(vector)


def _of_transform(a: Sequence[Any]) -> None:
    for factor in (maybe_values(a[2], a[5]), maybe_values(a[3], a[6])):
        if factor is not None:
            exact_in_tf32(factor)
    maybe_values(a[1], a[4])


def _of_int8(a: Sequence[Any]) -> None:
    _of_end(a, exponent=4)


def _of_int4(a: Sequence[Any]) -> None:
    _of_end(a, exponent=5)


def _of_end(a: Sequence[Any], *, exponent: int) -> None:
    scale = maybe_values(a[2], a[exponent])
    assert scale is not None
    float32(scale)
    if a[3] is not None:
        float32(a[3])


_MOST = 12
"""Operands of the operator that has the most."""

_DERIVED: dict[Any, Callable[[Sequence[Any]], None]] = {
    _OPS.linear.default: _of_linear,
    _OPS.transform.default: _of_transform,
    _OPS.int8_linear.default: _of_int8,
    _OPS.int4_linear.default: _of_int4,
}

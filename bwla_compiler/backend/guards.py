"""Dynamo's guards on packed weights: those that protect nothing are left out.

A packed linear has some seven tensors, each checked before every call: a tenth of the time of a small model's step. Of
the integers that our operators read, only the signs decide a shape: the operators look at all the others at every call,
whatever they are by then, and say what does not fit. So nothing compiled depends on them, and Dynamo need not look too.
Guards on signs, on floats (which may ask for a gradient) and on what others read stay; so do all on a GPU, where
kernels in the graph read the tensors with no operator to look at them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bwla_compiler.runtime.ops import LIBRARY

_OPS: Any = getattr(torch.ops, LIBRARY.ns)
_FREE: dict[Any, frozenset[int]] = {
    _OPS.linear.default: frozenset((2, 3, 4, 5, 6, 9, 10, 11)),
    _OPS.transform.default: frozenset((1, 2, 3, 4, 5, 6)),
}
"""Operands, by place, that decide no shape: all but x, signs and bias."""


def leave_out_guards(gm: GraphModule, example_inputs: Sequence[Any]) -> int:
    """Drop the checks of a graph's inputs that nothing compiled depends on; return for how many inputs.

    gm, example_inputs: as Dynamo passes them to a backend, while it traces. Nothing is dropped outside of that.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None:
        return 0
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    free = {
        node.meta["grapharg"].source
        for node, value in zip(placeholders, example_inputs, strict=True)
        if "grapharg" in node.meta
        and isinstance(value, Tensor)
        and not value.is_floating_point()
        and value.is_cpu
        and _is_free(node)
    }
    guards = context.guards_context.dynamo_guards
    left = [guard for guard in guards.inner if not (guard.originating_source in free and _is_tensors(guard))]
    guards.inner = type(guards.inner)(left)
    return len(free)


def _is_free(node: Node) -> bool:
    """Whether an input is only read where its shape and dtype decide nothing."""
    return all(
        user.target in _FREE
        and not user.kwargs
        and all(i in _FREE[user.target] for i, read in enumerate(user.args) if read is node)
        for user in node.users
    )


def _is_tensors(guard: Any) -> bool:
    return bool(guard.create_fn_name() == "TENSOR_MATCH")

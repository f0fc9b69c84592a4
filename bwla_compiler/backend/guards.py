"""Dynamo's guards on packed weights: those that protect nothing are left out.

A packed linear has some seven tensors, each checked before every call: a tenth of the time of a small model's step. Of
the integers that our operators read, only the signs decide a shape: the operators look at all the others at every call,
whatever they are by then, and say what does not fit. So nothing compiled depends on them, and Dynamo need not look too.
Signs of another shape are told by their sealed module, like which buffers are None and which attributes there are: one
guard is for all of these. Signs that took another shape in place `Program` refuses. Guards on floats (which may ask a
gradient) and on what others read stay; so do all on tensors of a GPU, where kernels in the graph read them with no
operator to look at them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from bwla_compiler.backend.owner import evaluate, name_of
from bwla_compiler.runtime.ops import LIBRARY
from bwla_compiler.runtime.sealed import FACTS, WATCHED, Sealed

_OPS: Any = getattr(torch.ops, LIBRARY.ns)
_FREE: dict[Any, frozenset[int]] = {
    _OPS.linear.default: frozenset((1, 2, 3, 4, 5, 6, 9, 10, 11)),
    _OPS.transform.default: frozenset((1, 2, 3, 4, 5, 6)),
    _OPS.linear_of.default: frozenset((1,)),
    _OPS.transform_of.default: frozenset((1,)),
    _OPS.prologue_of.default: frozenset((1,)),
}
"""Operands, by place, that need no guard: all but x and bias."""
_SIGNS = 1
_ANCHORED = (_OPS.linear_of.default, _OPS.transform_of.default, _OPS.prologue_of.default)


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
    guards.inner = type(guards.inner)(_without_sealed(left))
    return len(free)


def shapes_of_signs(gm: GraphModule) -> dict[int, torch.Size]:
    """Return the shapes of signs among a graph's inputs, by number of the input; they decide those of results.

    Symbolic ones are left out: the graph then reads sizes from the signs of each call.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    shapes = {
        i: node.meta["example_value"].shape
        for i, node in enumerate(placeholders)
        if any(user.target is _OPS.linear.default and user.args[_SIGNS] is node for user in node.users)
    }
    return {i: shape for i, shape in shapes.items() if all(isinstance(size, int) for size in shape)}


def facts_of_anchors(gm: GraphModule) -> dict[int, str]:
    """Return the facts of the modules whose anchors are among a graph's inputs, by number of the input."""
    found: dict[int, str] = {}
    for i, node in enumerate(node for node in gm.graph.nodes if node.op == "placeholder"):
        for user in node.users:
            if user.target in _ANCHORED and user.args[1] is node:
                found[i] = user.args[2]
    return found


_OF_PARTS = frozenset(
    {"CONSTANT_MATCH", "EQUALS_MATCH", "DICT_NOT_CONTAINS", "NOT_PRESENT_IN_GENERIC_DICT", "TYPE_MATCH"}
)
"""What Dynamo checks of a module's parts beside its tensors."""


def _without_sealed(guards: list[Any]) -> list[Any]:
    """Leave out guards on the parts of sealed modules whose facts are guarded."""
    told = {name_of(g.originating_source) for g in guards}
    found: dict[str, Any] = {}

    def is_told(source: Any) -> bool:
        """Whether the innermost module on the way to what a source names, itself included, tells its facts."""
        while source is not None:
            name = name_of(source)
            if name not in found:
                found[name] = evaluate(source)
            if isinstance(found[name], nn.Module):
                return isinstance(found[name], Sealed) and bool(found[name].facts) and f"{name}.{FACTS}" in told
            source = getattr(source, "base", None)
        return False

    left = []
    for guard in guards:
        source = guard.originating_source
        if guard.create_fn_name() in _OF_PARTS and name_of(source).rpartition(".")[2] not in (*WATCHED, FACTS):
            of_itself = guard.create_fn_name() == "NOT_PRESENT_IN_GENERIC_DICT"  # no `forward` of its own, say
            if is_told(source if of_itself else _around(source)):
                continue
        left.append(guard)
    return left


def _around(source: Any) -> Any:
    """Return the source of what holds what this one names; None for an outermost one."""
    name = name_of(source)
    while source is not None and name_of(source) == name:  # sources of one thing may be wrapped in each other
        source = getattr(source, "base", None)
    return source


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

"""Dynamo's guards on packed models: those that protect nothing are left out.

On a CPU a graph takes the anchor of a packed module in place of its tensors (`runtime.anchors`); what runs it looks at
these itself, at every call. So the anchor need not be looked at. Which buffers are None, what their shapes are and
which attributes there are is told by the module's facts (`runtime.sealed`): one guard is for all of these. Guards on
what others read stay; so do all on the tensors of a GPU, where kernels in the graph read them with no operator to look.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from bwla_compiler.backend.owner import evaluate, name_of
from bwla_compiler.errors import CaptureError
from bwla_compiler.runtime.ops import LIBRARY
from bwla_compiler.runtime.sealed import FACTS, TENSORS, WATCHED, Sealed

_OPS: Any = getattr(torch.ops, LIBRARY.ns)
_ANCHORED = (_OPS.linear_of.default, _OPS.transform_of.default, _OPS.prologue_of.default)
_ANCHOR, _FACTS = 1, 2
"""Operands of these by place."""


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
        and node.users
        and all(_is_anchor(node, user) for user in node.users)
    }
    guards = context.guards_context.dynamo_guards
    left = [guard for guard in guards.inner if not (guard.originating_source in free and _is_tensors(guard))]
    guards.inner = type(guards.inner)(_without_sealed(left))
    return len(free)


def refuse_replaced_tensors(gm: GraphModule) -> None:
    """Raise CaptureError where the traced function puts other tensors into a packed module that anchors stand for.

    gm: as Dynamo passes it to a backend, while it traces. An anchor stands for what its module holds when compiled code
    runs: its own tensors again, by then.
    """
    if not facts_of_anchors(gm) or torch._guards.TracingContext.try_get() is None:
        return
    from torch._dynamo.symbolic_convert import InstructionTranslator  # Dynamo traces: it has been imported

    effects = InstructionTranslator.current_tx().output.side_effects
    for changed in filter(effects.is_modified, effects.id_to_variable.values()):
        source: Any = getattr(changed, "source", None)
        if getattr(source, "member", "") in TENSORS and isinstance(evaluate(source.base), Sealed):
            module = re.sub(r"\._modules\['(\w+)'\]", r".\1", name_of(source.base))
            raise CaptureError(
                f"{module}: the compiled function puts other tensors into this packed module, as functional_call does, "
                "and compiled code would read its own: have functional_call around compiled code, not within"
            )


def facts_of_anchors(gm: GraphModule) -> dict[int, str]:
    """Return the facts of the modules whose anchors are among a graph's inputs, by number of the input."""
    found: dict[int, str] = {}
    for i, node in enumerate(node for node in gm.graph.nodes if node.op == "placeholder"):
        for user in node.users:
            if _is_anchor(node, user):
                found[i] = user.args[_FACTS]
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


def _is_anchor(node: Node, user: Node) -> bool:
    """Whether an input is the anchor of a call, and nothing else that it reads."""
    return user.target in _ANCHORED and [i for i, read in enumerate(user.args) if read is node] == [_ANCHOR]


def _is_tensors(guard: Any) -> bool:
    return bool(guard.create_fn_name() == "TENSOR_MATCH")

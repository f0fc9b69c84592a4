"""Who owns the parameters of a graph of torch.compile: the outermost module, and each tensor's name in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from bwla_compiler.errors import PlanError
from bwla_compiler.graph.planner import is_linear


@dataclass(frozen=True)
class Owner:
    """A module and the names of its tensors: by placeholder of the graph, all that the tensor goes by."""

    module: nn.Module
    names: dict[Node, tuple[str, ...]]

    def present(self) -> set[str]:
        """Return every name of every tensor that the graph reads."""
        return {name for names in self.names.values() for name in names}


def find_owner(gm: GraphModule, example_inputs: Sequence[Any]) -> Owner | None:
    """Return the module that torch.compile is compiling, None where the graph reads no module's parameters.

    gm, example_inputs: as Dynamo passes them to a backend, while it traces. The compiled code is from now on bound
    to this very module: another instance of its class is compiled anew, and never meets this one's weights.
    Raises PlanError where the graph reads the weights of several modules that no module holds together.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders, example_inputs, strict=True))
    roots: list[nn.Module] = []
    owned: set[int] = set()
    for node in placeholders:
        if isinstance(inputs[node], nn.Parameter) and id(inputs[node]) not in owned:
            root = _outermost(node.meta["grapharg"].source)
            if root is not None:
                roots.append(root)
                owned.update(map(id, root.parameters()))
    if not roots:
        return None
    module = _single(roots)
    by_tensor: dict[int, list[str]] = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        by_tensor.setdefault(id(tensor), []).append(name)
    names = {node: tuple(by_tensor[id(value)]) for node, value in inputs.items() if id(value) in by_tensor}
    return Owner(module, names)


def _single(roots: list[nn.Module]) -> nn.Module:
    """Return the one module that has linears, the first where none has. Raises PlanError where several have."""
    having = [root for root in roots if any(map(is_linear, root.modules()))]
    if len(having) > 1:
        raise PlanError(
            f"the compiled function calls {len(having)} modules ({', '.join(type(r).__name__ for r in having)}), and "
            "weights are quantized for one; put them into one nn.Module, or compile each of them"
        )
    return (having or roots)[0]


def _outermost(source: Any) -> nn.Module | None:
    """Return the outermost module on the way to a tensor, and guard the compiled code on its identity."""
    from torch._dynamo.guards import GuardBuilder  # Dynamo traces: it has been imported

    found, where = None, None
    while source is not None:
        value = evaluate(source)
        if isinstance(value, nn.Module):
            found, where = value, source
        source = getattr(source, "base", None)
    if where is not None:
        context = torch._guards.TracingContext.get()
        context.guards_context.dynamo_guards.add(where.make_guard(GuardBuilder.ID_MATCH))
    return found


def name_of(source: Any) -> str:
    """Return the expression that a Dynamo source stands for."""
    name: str = source.name if isinstance(source.name, str) else source.name()
    return name


def evaluate(source: Any) -> Any:
    """Return what a Dynamo source names, while Dynamo traces; None for what an expression cannot reach."""
    from torch._dynamo.symbolic_convert import InstructionTranslator  # Dynamo traces: it has been imported

    output = InstructionTranslator.current_tx().output
    try:
        return eval(name_of(source), {"L": output.local_scope, "G": output.global_scope})
    except Exception:  # sources may name what exists only inside Dynamo
        return None

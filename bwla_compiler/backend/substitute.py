"""A graph of torch.compile rewritten to call a quantized copy of the model in place of the original's parameters."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from bwla_compiler.backend.owner import Owner
from bwla_compiler.backend.substitute_experts import call_experts
from bwla_compiler.graph.planner import is_linear
from bwla_compiler.runtime.modules import Int8Embedding, Int8Linear, PackedLinear, TiedHead

_LINEAR = {torch._C._nn.linear, torch.nn.functional.linear}
_EMBEDDING = {torch.nn.functional.embedding, torch.embedding}
_PACKED_LINEAR = (PackedLinear, Int8Linear, TiedHead)


def bound_to(owner: Owner, gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[GraphModule, list[Any]]:
    """Return the graph with the owner's tensors as attributes, and the example values of the inputs that remain."""
    graph, placeholders = _copied(gm)
    left = []
    for (original, node), value in zip(placeholders.items(), example_inputs, strict=True):
        if original in owner.names:
            with graph.inserting_before(node):
                attribute = graph.get_attr(owner.names[original][0])
            node.replace_all_uses_with(attribute)
            graph.erase_node(node)
        else:
            left.append(_concrete(value))
    return GraphModule(owner.module, graph), left


def _concrete(value: Any) -> Any:
    """Return an example input for another trace: sizes as numbers, tensors of this size with values of their own."""
    if isinstance(value, torch.SymInt):
        return value.node.hint  # int(value) would have Dynamo guard on this very size, and compile anew for each
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _copied(gm: GraphModule) -> tuple[Graph, dict[Node, Node]]:
    """Return a copy of the graph, for Dynamo's own must stay as it is, and the copies of its placeholders."""
    graph = copy.deepcopy(gm.graph)
    placeholders = {}
    for original, node in zip(gm.graph.nodes, graph.nodes, strict=True):
        if node.op == "placeholder":
            placeholders[original] = node
            if hasattr(original, "_dynamo_source"):
                node._dynamo_source = original._dynamo_source  # AOTAutograd asks the inputs where they come from
    return graph, placeholders


def substitute(owner: Owner, gm: GraphModule, quantized: nn.Module) -> GraphModule | str:
    """Return the graph that computes with the quantized copy; or why one of its parameters cannot be replaced.

    Linears and embeddings become calls of the copy's modules, other parameters the copy's own. The placeholders stay
    as they were, those of parameters unread. Tensors of the result are the copy's: an edit of them is seen.
    """
    graph, placeholders = _copied(gm)
    weights = {
        node: owner.names[original]
        for original, node in placeholders.items()
        if original in owner.names and isinstance(original.meta["grapharg"].example, nn.Parameter)
    }
    tables: dict[str, nn.Module] = {}
    for node, names in weights.items():
        call_experts(graph, node, names, quantized)
        for user in list(node.users):
            _call_module(graph, node, user, names, quantized, tables)
    own = dict(quantized.named_parameters(remove_duplicate=False))
    for node, names in weights.items():  # after the calls, which take over the biases
        for user in list(node.users):
            name = next((n for n in names if n in own), "")
            if not name:
                return f"{names[0]} is read by {user.name} ({user.target}), which has no packed form"
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.get_attr(name))
    new = GraphModule(quantized, graph)
    _add_tables(new, tables)
    new.meta = dict(gm.meta)
    _name_sources(new, gm)
    graph.lint()
    return new


def _add_tables(new: GraphModule, tables: dict[str, nn.Module]) -> None:
    """Add the embeddings that heads refer to, each once.

    AOTAutograd swaps the tensors of every name while it traces, and under two names it would not put them back.
    """
    held = {id(module) for module in new.modules()}
    for name, table in tables.items():
        if id(table) not in held:
            new.add_submodule(name, table)
            held.add(id(table))


def _call_module(
    graph: Graph, weight: Node, user: Node, names: tuple[str, ...], quantized: nn.Module, tables: dict[str, nn.Module]
) -> None:
    """Replace an operation by a call of the module whose weight it reads, where it is all that the module does."""
    call = _module_call(weight, user, names, quantized)
    if call is None:
        return
    name, x = call
    module = quantized.get_submodule(name)
    if isinstance(module, TiedHead):  # it refers to its embedding, which must be in the graph beside it
        tables[f"table_of_{name.replace('.', '_')}"] = module.embedding
    with graph.inserting_before(user):
        result = graph.call_module(name, (x,))
    result.meta = dict(user.meta)
    user.replace_all_uses_with(result)
    graph.erase_node(user)


def _module_call(weight: Node, user: Node, names: tuple[str, ...], quantized: nn.Module) -> tuple[str, Node] | None:
    """Return (module, input) where an operation is what one of the weight's modules does, whole and alone."""
    owners = [n.rpartition(".")[0] for n in names if n.endswith("weight")]
    modules = [(name, quantized.get_submodule(name)) for name in owners]
    if user.op != "call_function":
        return None
    if user.target in _LINEAR and user.args[1:2] == (weight,) and isinstance(user.args[0], Node):
        fitting = [n for n, m in modules if type(m) is nn.Linear or isinstance(m, _PACKED_LINEAR)]
        return (fitting[0], user.args[0]) if fitting else None
    if user.target is torch.addmm and user.args[2:] == (weight,) and not user.kwargs and isinstance(user.args[1], Node):
        fitting = [n for n, m in modules if isinstance(m, PackedLinear) or (is_linear(m) and type(m) is not nn.Linear)]
        return (fitting[0], user.args[1]) if fitting else None
    if user.target in _EMBEDDING and weight in user.args[:2]:
        ids = user.args[0] if user.args[1] is weight else user.args[1]
        fitting = [n for n, m in modules if isinstance(m, Int8Embedding)]
        return (fitting[0], ids) if fitting and isinstance(ids, Node) else None
    return None


def _name_sources(new: GraphModule, gm: GraphModule) -> None:
    """Tell AOTAutograd where the copy's tensors come from: they are constants of this compilation."""
    from torch._dynamo.source import ConstantSource

    tensors = (*new.named_parameters(remove_duplicate=False), *new.named_buffers(remove_duplicate=False))
    known: dict[str, Any] = dict(getattr(gm, "_param_name_to_source", None) or {})
    new._param_name_to_source = known | {  # type: ignore[assignment]
        name: ConstantSource("bwla_" + name.replace(".", "_")) for name, _ in tensors
    }

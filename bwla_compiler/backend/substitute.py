"""A graph of torch.compile rewritten to call a quantized copy of the model in place of the original's parameters."""

import copy
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from bwla_compiler.backend.owner import Owner
from bwla_compiler.backend.substitute_experts import call_experts
from bwla_compiler.errors import PlanError
from bwla_compiler.graph.planner import is_linear
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, PackedLinear, TiedHead

_LINEAR = {torch._C._nn.linear, torch.nn.functional.linear}
_EMBEDDING = {torch.nn.functional.embedding, torch.embedding}
_PACKED_LINEAR = (PackedLinear, EndLinear, TiedHead)

Parameters = Mapping[Node, tuple[str, ...]]
"""The names that the model has for each placeholder of a parameter."""


def bound_to(owner: Owner, gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[GraphModule, list[Any]]:
    """Return the graph with the owner's tensors as attributes, and the example values of the inputs that remain.

    Raises PlanError where the graph holds graphs of its own, as of torch.cond or flex attention.
    """
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
    for node in graph.find_nodes(op="get_attr"):
        if not hasattr(owner.module, str(node.target).partition(".")[0]):
            raise PlanError(f"the graph calls a graph of its own ({node.target}), which no pass looks into")
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
            _call_module(graph, node, user, weights, quantized, tables)
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


@dataclass(frozen=True)
class _Call:
    """Operations that together are what a module does, whole and alone: from input x to result."""

    module: str
    x: Node
    result: Node


def _call_module(
    graph: Graph, weight: Node, user: Node, known: Parameters, quantized: nn.Module, tables: dict[str, nn.Module]
) -> None:
    """Replace the operations that read a weight by a call of its module, where they are all that the module does."""
    call = _module_call(weight, user, known, quantized)
    if call is None:
        return
    module = quantized.get_submodule(call.module)
    if isinstance(module, TiedHead):  # it refers to its embedding, which must be in the graph beside it
        tables[f"table_of_{call.module.replace('.', '_')}"] = module.embedding
    with graph.inserting_before(call.result):
        made = graph.call_module(call.module, (call.x,))
    made.meta = dict(call.result.meta)
    call.result.replace_all_uses_with(made)
    _erase(graph, call.result, down_to=weight)


def _erase(graph: Graph, node: Node, *, down_to: Node) -> None:
    """Erase an operation that nobody reads, and those of its inputs that read `down_to` and are unread then."""
    before = [n for n in node.all_input_nodes if n is not down_to and n.op != "placeholder"]
    graph.erase_node(node)
    for inner in before:
        if not inner.users and down_to in inner.all_input_nodes:
            _erase(graph, inner, down_to=down_to)


def _module_call(weight: Node, user: Node, known: Parameters, quantized: nn.Module) -> _Call | None:
    """Return the call of one of the weight's modules that stands for the operations from `user` on."""
    owners = [n.rpartition(".")[0] for n in known[weight] if n.endswith("weight")]
    modules = [(name, quantized.get_submodule(name)) for name in owners]
    if user.op != "call_function":
        return None
    if user.target in _LINEAR and user.args[1:2] == (weight,) and isinstance(user.args[0], Node):
        fitting = [n for n, m in modules if type(m) is nn.Linear or isinstance(m, _PACKED_LINEAR)]
        return _Call(fitting[0], user.args[0], user) if fitting else None
    if user.target is torch.addmm and user.args[2:] == (weight,) and not user.kwargs and isinstance(user.args[1], Node):
        fitting = [n for n, m in modules if isinstance(m, PackedLinear) or (is_linear(m) and type(m) is not nn.Linear)]
        return _Call(fitting[0], user.args[1], user) if fitting else None
    if user.target is getattr and user.args == (weight, "T"):
        fitting = [n for n, m in modules if isinstance(m, _PACKED_LINEAR)]
        return _transposed(user, fitting[0], known) if fitting else None
    if user.target in _EMBEDDING and weight in user.args[:2]:
        ids = user.args[0] if user.args[1] is weight else user.args[1]
        fitting = [n for n, m in modules if isinstance(m, EndEmbedding)]
        return _looked_up(user, ids, fitting[0], quantized) if fitting and isinstance(ids, Node) else None
    return None


def _transposed(transpose: Node, name: str, known: Parameters) -> _Call | None:
    """Return the call that stands for x @ weight.T (+ bias), as Falcon's linears are written."""
    product = _only_user(transpose, {operator.matmul, torch.matmul})
    if product is None or product.args[1] is not transpose or not isinstance(product.args[0], Node):
        return None
    total = _only_user(product, {operator.add, torch.add})  # a bias that folding gave the copy is not in the graph
    biased = total is not None and any(f"{name}.bias" in known.get(x, ()) for x in total.all_input_nodes)
    return _Call(name, product.args[0], total if total is not None and biased else product)


def _looked_up(rows: Node, ids: Node, name: str, quantized: nn.Module) -> _Call | None:
    """Return the call that stands for weight[ids], and for the product with its gain where the module has one."""
    gain = quantized.get_submodule(name)._buffers["gain"]
    if gain is None:
        return _Call(name, ids, rows)
    product = _only_user(rows, {operator.mul, torch.mul})
    if product is None or not _is_gain(product.args[0] if product.args[1] is rows else product.args[1], gain):
        return None
    return _Call(name, ids, product)


def _is_gain(factor: Any, gain: Tensor) -> bool:
    """Whether what an embedding's rows are multiplied by is its gain: that number, or the module's own tensor."""
    while isinstance(factor, Node) and factor.op == "call_method" and factor.target == "to":
        factor = factor.args[0]
    if isinstance(factor, Node):
        return factor.op == "placeholder" and "embed_scale" in str(factor.target)
    return bool(torch.tensor(factor, dtype=gain.dtype) == gain)


def _only_user(node: Node, targets: Collection[Any]) -> Node | None:
    """Return what reads a node, where that is one operation, and one of these."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.op == "call_function" and user.target in targets else None


def _name_sources(new: GraphModule, gm: GraphModule) -> None:
    """Tell AOTAutograd where the copy's tensors come from: they are constants of this compilation."""
    from torch._dynamo.source import ConstantSource

    tensors = (*new.named_parameters(remove_duplicate=False), *new.named_buffers(remove_duplicate=False))
    known: dict[str, Any] = dict(getattr(gm, "_param_name_to_source", None) or {})
    new._param_name_to_source = known | {  # type: ignore[assignment]
        name: ConstantSource("bwla_" + name.replace(".", "_")) for name, _ in tensors
    }

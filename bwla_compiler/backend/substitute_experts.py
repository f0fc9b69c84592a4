"""Products with the weights of experts in a graph of torch.compile, made calls of the packed experts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from bwla_compiler.graph.experts import experts_of_batches, experts_of_rows
from bwla_compiler.runtime.experts import PackedExperts

_GROUPED = ("transformers.grouped_mm_fallback", "transformers.grouped_mm_fallback.default")
"""By name: transformers registers its operator only when a model with experts is imported."""

_TORCH_GROUPED = {
    f for f in (getattr(torch, "_grouped_mm", None), getattr(nn.functional, "grouped_mm", None)) if f is not None
}


def call_experts(graph: Graph, weight: Node, names: tuple[str, ...], quantized: nn.Module) -> None:
    """Replace the products that read a weight of experts by calls of the packed experts of that name, if any."""
    modules = {name: _module(quantized, name) for name in names}
    name = next((n for n, module in modules.items() if isinstance(module, PackedExperts)), "")
    module = modules.get(name)
    if not isinstance(module, PackedExperts):
        return
    for product, read in list(_products(weight)):
        with graph.inserting_before(product):
            result = _call(graph, product, name, module)
        result.meta = dict(product.meta)
        product.replace_all_uses_with(result)
        graph.erase_node(product)
        if read is not weight and not read.users:
            graph.erase_node(read)


def _module(root: nn.Module, name: str) -> object:
    """Return what stands at a dotted name, None for nothing."""
    owner: object = root
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner


def _products(weight: Node) -> Iterator[tuple[Node, Node]]:
    """Yield (product, what it reads): of the weight as it is, or with its last two axes exchanged."""
    for user in weight.users:
        if user.op == "call_method" and user.target == "transpose" and set(user.args[1:]) == {-2, -1}:
            yield from ((product, user) for product in user.users if _multiplies(product, user))
        elif _multiplies(user, weight):
            yield user, weight


def _multiplies(node: Node, read: Node) -> bool:
    known = node.target in _TORCH_GROUPED or node.target is torch.bmm or str(node.target) in _GROUPED
    return node.op == "call_function" and known and node.args[1:2] == (read,)


def _call(graph: Graph, product: Node, name: str, module: PackedExperts) -> Node:
    """Return the result of the packed experts on what a product multiplies, shaped as the product's."""
    x: Any = product.args[0]
    if product.target is not torch.bmm:
        offsets = product.args[2] if len(product.args) > 2 else product.kwargs["offs"]
        return graph.call_module(name, (x, graph.call_function(experts_of_rows, (offsets, x))))
    rows = graph.call_function(torch.flatten, (x, 0, 1))
    experts = graph.call_function(experts_of_batches, (module.n_experts, rows))
    y = graph.call_module(name, (rows, experts))
    return graph.call_method("unflatten", (y, 0, (module.n_experts, -1)))

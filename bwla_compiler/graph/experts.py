"""Experts: modules with one matrix per expert in a parameter of three axes, and how a graph sends rows to them."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.analysis import Analysis

Form = Literal["routed", "batched", ""]

_BATCHED = ("Llama4TextExperts",)
_SORT = "aten.sort"


def experts_form(module: nn.Module) -> Form:
    """Return how a module calls its experts, "" where that is not known.

    routed: rows go to the experts that a router chose, by the interface for experts of transformers, which any
    implementation may stand for. batched: every expert gets as many rows, by a module that names no interface.
    """
    if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "has_bias"):
        return "routed"
    return "batched" if type(module).__name__ in _BATCHED else ""


def projections(module: nn.Module) -> tuple[str, str]:
    """Return the names of the two weights of experts, in the order in which they are called."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def routers(analysis: Analysis) -> set[Node]:
    """Return the linears that decide which rows go to which expert: the last ones on the way to the offsets."""
    frontier = [site.offsets for site in analysis.sites.values() if site.offsets is not None]
    seen: set[Node] = set()
    found: set[Node] = set()
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in analysis.sites:
            found.add(node)
        else:
            frontier.extend(node.all_input_nodes)
    return found


def sorting_of(offsets: Node) -> tuple[Node, int] | None:
    """Return (permutation, choices): the node that says which choice each sorted row is, and choices per token.

    Row r of what the experts read is choice permutation[r] % choices of token permutation[r] // choices. None where the
    rows are not sorted by a node of the graph.
    """
    frontier, seen = [offsets], set[Node]()
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        if str(node.target).startswith(_SORT):
            order = next((user for user in node.users if user.target in ops.GETITEM and user.args[1] == 1), None)
            return None if order is None else (order, _choices(node.args[0]))
        frontier.extend(node.all_input_nodes)
    return None


def _choices(flat: object) -> int:
    """Return how many experts a token goes to: the last size of what was flattened to be sorted."""
    node = flat
    while isinstance(node, Node) and node.target in ops.VIEW | ops.SAME and len(node.meta["val"].shape) == 1:
        node = node.args[0]
    assert isinstance(node, Node)
    shape = node.meta["val"].shape
    return int(shape[-1]) if len(shape) == 2 else 1


def experts_of_rows(offsets: Tensor, rows: Tensor) -> Tensor:
    """Return the expert [N] int64 of each of rows [N, in], sorted by expert; offsets [E]: where each expert's end.

    Rows beyond the last offset belong to none: E.
    """
    places = torch.arange(rows.shape[0], device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, places, right=True)


def experts_of_batches(n_experts: int, rows: Tensor) -> Tensor:
    """Return the expert [N] int64 of each of rows [N, in] that are cut into equal parts, one per expert.

    A row of zeros belongs to none (E): so a token looks to an expert that it is not sent to, and its product is zero.
    """
    numbers = torch.arange(n_experts, device=rows.device).unsqueeze(1)
    experts = numbers.expand(-1, rows.shape[0] // n_experts).flatten()
    return torch.where(rows.any(-1), experts, n_experts)

"""The function that torch.compile calls, and the word that weights were edited behind its back."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from bwla_compiler.backend.guards import leave_out_guards, refuse_replaced_tensors
from bwla_compiler.backend.lower import HandOver, lower
from bwla_compiler.backend.numbers import settle_numbers
from bwla_compiler.backend.options import read_options
from bwla_compiler.backend.owner import find_owner
from bwla_compiler.backend.progress import telling
from bwla_compiler.backend.raw import RawGraph, variants_of
from bwla_compiler.runtime import ops
from bwla_compiler.runtime.native import forget

log = logging.getLogger(__name__)


def compile_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    hand_over: HandOver | None = None,
) -> Callable[..., Any]:
    """Return the compiled form of one graph of a model.

    gm, example_inputs: from torch.compile. mode: Inductor's, passed on. options: see `Options`.
    hand_over: what compiles the rest in place of Inductor.
    Raises RecipeError for unknown options or modes; what planning and quantizing raise for a raw model.
    """
    chosen = read_options(options, mode)
    hand_over = hand_over or lower
    if _is_packed(gm):
        refuse_replaced_tensors(gm)
        leave_out_guards(gm, example_inputs)
        return hand_over(gm, example_inputs, mode=mode)
    owner = find_owner(gm, example_inputs)
    if owner is None:
        log.info("the graph reads no parameters: left to Inductor")
        return hand_over(gm, example_inputs, mode=mode)
    settle_numbers(gm)
    with torch.no_grad(), telling() as progress:
        return RawGraph(gm, example_inputs, owner, chosen, progress, hand_over).compiled()


def refresh(model: nn.Module) -> None:
    """Have a model's weights read anew at its next compiled call, after an edit that torch cannot see.

    Needed after `p.data.mul_(...)` and other writes through `.data` or NumPy, and after any edit of weights made
    under torch.inference_mode(); all other edits are seen without it. Raw and packed models.
    """
    model = getattr(model, "_orig_mod", model)
    for module in model.modules():  # where a graph broke, its parts belong to modules inside
        for variant in variants_of(module):
            variant.forget()
    for tensor in (*model.parameters(), *model.buffers()):
        forget(tensor)


def _is_packed(gm: GraphModule) -> bool:
    """Whether any operator of ours is in the graph."""
    return any(str(node.target).startswith(f"{ops.LIBRARY.ns}.") for node in gm.graph.nodes)

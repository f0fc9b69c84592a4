"""Capture: a decoder LM becomes one functional ATen graph, logits = graph(input_ids), in the normal form.

The normal form is what `torch.export` gives after `run_decompositions({})`: no mutation, no views that
alias, `linear`, `scaled_dot_product_attention`, `layer_norm` and `embedding` kept whole, and the model's own
parameters as `get_attr` nodes (the same tensors: an edit of a parameter is seen by the graph).
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from bwla_compiler.errors import CaptureError
from bwla_compiler.tokens import device_of, evaluating

log = logging.getLogger(__name__)
aten = torch.ops.aten

PREFIX = "model."
"""What the wrapper puts before the model's own parameter names."""


class _LogitsOnly(nn.Module):
    """A causal LM as a function from token ids to logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        out = self.model(input_ids=input_ids, use_cache=False)
        logits = out if isinstance(out, Tensor) else out.logits
        assert isinstance(logits, Tensor)
        return logits


def capture(model: nn.Module, *, batch: int = 3, length: int = 11) -> GraphModule:
    """Return the model's graph for token ids of shape [batch, length], as functional ATen.

    The default sizes are odd primes that no hidden size divides, so that no axis is mistaken for another.
    Raises CaptureError with the exporter's own words.
    """
    ids = torch.zeros(batch, length, dtype=torch.int64, device=device_of(model))
    try:
        with evaluating(model):
            exported = torch.export.export(_LogitsOnly(model), (), {"input_ids": ids}, strict=False)
            graph_module = exported.run_decompositions({}).module(check_guards=False)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__}: torch.export could not trace it: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}. "
            "Set BWLA_DEBUG=1 for the whole trace; the model must run as model(input_ids=..., use_cache=False)"
        ) from error
    assert isinstance(graph_module, GraphModule)
    _drop_checks(graph_module)
    log.info("captured %s: %d nodes", type(model).__name__, len(graph_module.graph.nodes))
    return graph_module


def _drop_checks(gm: GraphModule) -> None:
    """Erase guards and metadata assertions: they compute nothing."""
    for node in reversed(list(gm.graph.nodes)):
        guard = node.op == "call_module" and "guard" in str(node.target)
        if (guard or node.target is aten._assert_tensor_metadata.default) and not node.users:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()


def lift_casts(gm: GraphModule) -> None:
    """Turn float32 casts into float64, in place: norms hard-code float32, which would hide errors below 1e-7."""
    for node in gm.graph.nodes:
        node.args = tuple(_lift(a) for a in node.args)
        node.kwargs = {k: _lift(a) for k, a in node.kwargs.items()}
    gm.recompile()


def _lift(argument: object) -> object:
    return torch.float64 if argument is torch.float32 else argument


def attribute(gm: GraphModule, node: Node) -> Tensor:
    """Return the tensor that a get_attr node names."""
    value: object = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def input_shape(gm: GraphModule) -> tuple[int, ...]:
    """Return the shape [batch, length] of token ids that a graph was captured for."""
    ids = next(node for node in gm.graph.nodes if node.op == "placeholder")
    return tuple(ids.meta["val"].shape)


def rebind(gm: GraphModule, model: nn.Module, *, tied: Iterable[tuple[str, str]] = ()) -> bool:
    """Make a captured graph read the parameters that a model of the same architecture has now.

    tied: (embedding weight, head module) that were one tensor at the capture; where they no longer are, the graph
    follows the embedding, and what it computes after the head's product is wrong. Returns False, the graph unchanged,
    where the model has parameters that it has no place for (a bias added by a fold): only a new capture will do.
    """
    followed = {f"{head}.weight": embedding for embedding, head in tied}
    nodes = [node for node in gm.graph.nodes if node.op == "get_attr"]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources = {node: followed.get(parameter_name(node), parameter_name(node)) for node in nodes}
    placed = {id(parameters[name]) for name in sources.values() if name in parameters}
    if any(id(parameter) not in placed for name, parameter in parameters.items() if name not in followed):
        return False
    for node, name in sources.items():
        if name in parameters:
            owner, _, leaf = str(node.target).rpartition(".")
            setattr(gm.get_submodule(owner), leaf, parameters[name])
    return True


def parameter_name(node: Node) -> str:
    """Return the model's own name of the tensor that a get_attr node names."""
    return str(node.target).removeprefix(PREFIX)

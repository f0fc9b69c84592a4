"""Capture: a decoder LM becomes one functional ATen graph, logits = graph(input_ids), in the normal form.

The normal form is what `torch.export` gives after `run_decompositions({})`: no mutation, no views that
alias, `linear`, `scaled_dot_product_attention`, `layer_norm` and `embedding` kept whole, and the model's own
parameters as `get_attr` nodes (the same tensors: an edit of a parameter is seen by the graph).
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

from bwla_compiler.errors import CaptureError
from bwla_compiler.tokens import device_of, evaluating

log = logging.getLogger(__name__)
aten = torch.ops.aten

Decompositions = dict[Any, Callable[..., Any]]

PREFIX = "model."
"""What the wrapper puts before the model's own parameter names."""


class _Function(nn.Module):
    """A causal LM as a function from token ids to logits, and to what its cache holds where that is asked for."""

    def __init__(self, model: nn.Module, *, cache: bool = False) -> None:
        super().__init__()
        self.model = model
        self.cache = cache

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = self.model(input_ids=input_ids, use_cache=self.cache)
        logits = out if isinstance(out, Tensor) else out.logits
        assert isinstance(logits, Tensor)
        return (logits, *_cached(getattr(out, "past_key_values", None))) if self.cache else logits


def _cached(cache: Any) -> list[Tensor]:
    """Return the tensors that a cache of transformers holds, layer by layer."""
    layers = getattr(cache, "layers", cache if isinstance(cache, tuple) else ())
    held = [x for layer in layers for x in (layer if isinstance(layer, tuple) else vars(layer).values())]
    return [x for x in held if isinstance(x, Tensor)]


class _IndicesOnCpu(TorchFunctionMode):
    """Makes tensors of the lists that a model indexes by on the CPU: of those on meta no rule could read a number."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__:
            x, index = args
            args = (x, tuple(map(_on_cpu, index)) if isinstance(index, tuple) else _on_cpu(index))
        return func(*args, **(kwargs or {}))


def _on_cpu(index: Any) -> Any:
    return torch.tensor(index, device="cpu") if isinstance(index, list) else index


def capture(
    model: nn.Module, *, batch: int = 3, length: int = 11, cache: bool = False, table: Decompositions | None = None
) -> GraphModule:
    """Return the model's graph for token ids of shape [batch, length], as functional ATen.

    The default sizes are odd primes that no hidden size divides, so that no axis is mistaken for another.
    cache: with the cache's tensors among the outputs, which pins their bases: what torch.compile needs, whose graphs
    share a cache with eager steps. table: of further decompositions, Inductor's for example, which leaves the normal
    form behind. Raises CaptureError with the exporter's own words.
    """
    ids = torch.zeros(batch, length, dtype=torch.int64, device=device_of(model))
    try:
        with evaluating(model), _IndicesOnCpu() if ids.is_meta else nullcontext():
            function, inputs = _Function(model, cache=cache), {"input_ids": ids}
            return _normal_form(function, (), inputs, name=type(model).__name__, table=table)
    except CaptureError as error:
        raise CaptureError(f"{error}; the model must run as model(input_ids=..., use_cache={cache})") from error


def capture_graph(gm: GraphModule, model: nn.Module, inputs: Sequence[Any]) -> GraphModule:
    """Return the normal form of a graph of torch.compile.

    gm: its placeholders are the inputs, [shapes as there], and its get_attr nodes name the model's own parameters.
    Raises CaptureError with the exporter's own words.
    """
    graph = copy.deepcopy(gm.graph)
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:  # computes nothing, and the exporter makes a subgraph of it
            graph.erase_node(node)
        elif node.op == "get_attr":
            node.target = PREFIX + str(node.target)
    bound = GraphModule(_Function(model), graph)
    with torch._guards.tracing(None), torch.no_grad():
        return _normal_form(bound, tuple(inputs), {}, name=type(model).__name__)


def _normal_form(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    name: str,
    table: Decompositions | None = None,
) -> GraphModule:
    try:
        with warnings.catch_warnings():
            # torch's own copies of its specs warn about their class
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            exported = torch.export.export(module, args, kwargs, strict=False)
            graph_module = exported.run_decompositions(table or {}).module(check_guards=False)
    except Exception as error:
        raise CaptureError(
            f"{name}: torch.export could not trace it: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}. "
            "Set BWLA_DEBUG=1 for the whole trace"
        ) from error
    assert isinstance(graph_module, GraphModule)
    _drop_checks(graph_module)
    log.info("captured %s: %d nodes", name, len(graph_module.graph.nodes))
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
        if node.target is aten.full.default and node.meta["val"].dtype is torch.float32:
            node.kwargs = {**node.kwargs, "dtype": torch.float64}  # by default; float64's lowest would not fit
    gm.recompile()


def _lift(argument: object) -> object:
    return torch.float64 if argument is torch.float32 else argument


def held(gm: GraphModule, node: Node) -> object:
    """Return what a get_attr node names: a tensor, or the subgraph of a higher-order operation."""
    value: object = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def attribute(gm: GraphModule, node: Node) -> Tensor:
    """Return the tensor that a get_attr node names."""
    value = held(gm, node)
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

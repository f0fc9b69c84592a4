"""TwinStream: one captured graph, run over all calibration batches by two streams that advance together.

The fp stream computes with the float weights, the quantized stream with the packed modules that have replaced
them so far. Both stop in front of each group of linears, so that its statistics can be gathered and its linears
replaced before anything downstream runs. Every node runs once per batch and stream; what nobody will read again
is freed, so that memory holds the live activations alone, and weights from their first use to their last.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, map_arg

from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.capture import attribute, parameter_name
from bwla_compiler.graph.experts import experts_of_batches, experts_of_rows

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Call:
    """A node that stands for a module: when the module was replaced, it is called on `source` instead.

    experts, offsets: of a product with the matrices of experts; see `graph.analysis.Site`.
    """

    node: Node
    source: Node
    module: str
    experts: int = 0
    offsets: Node | None = None


class TwinStream:
    """See the module's docstring.

    gm: captured for batches of the shape of `batches` (int64 [batch, length] each). calls: nodes that the
    quantized stream runs through the model's modules once those are replaced. values: what a get_attr node stands
    for, asked when it is first read; by default what the graph holds. keep: puts a result where it is kept.
    """

    def __init__(
        self,
        gm: GraphModule,
        model: nn.Module,
        batches: Sequence[Tensor],
        calls: Sequence[Call],
        *,
        values: Callable[[GraphModule, Node], Tensor] = attribute,
        keep: Callable[[Any], Any] | None = None,
    ) -> None:
        self.gm, self.model, self.batches = gm, model, batches
        self._values, self._kept = values, keep or (lambda value: value)
        self.calls = {call.node: call for call in calls}
        self.nodes: list[Node] = list(gm.graph.nodes)
        self.position = 0
        self.replaced: set[str] = set()
        self._index = {node: i for i, node in enumerate(self.nodes)}
        self._last_use = self._last_uses()
        self._constant = self._constants()
        self._shared: dict[Node, Any] = {}
        self._fp: list[dict[Node, Any]] = [{} for _ in batches]
        self._q: list[dict[Node, Any]] = [{} for _ in batches]

    def _last_uses(self) -> dict[Node, int]:
        found = {node: self._index[node] for node in self.nodes}
        for node in self.nodes:
            for source in node.all_input_nodes:
                found[source] = self._index[node]
        for call in self.calls.values():
            found[call.source] = max(found[call.source], self._index[call.node])
        return found

    def _constants(self) -> set[Node]:
        found: set[Node] = set()
        for node in self.nodes:
            free = node.op == "call_function" and all(i in found for i in node.all_input_nodes)
            if node.op == "get_attr" or free:
                found.add(node)
        return found

    def keep(self, node: Node, until: Node) -> None:
        """Keep a node's values alive until another node has run."""
        self._last_use[node] = max(self._last_use[node], self._index[until])

    def advance(self, until: Node) -> None:
        """Run both streams over all batches up to, and without, a node."""
        self._advance(self._index[until])

    def pass_by(self, prefix: str, *, before: Node) -> bool:
        """Run up to where nothing reads the parameters and modules under a name any more, but not as far as `before`.

        Returns whether that point was reached.
        """
        own = [n for n in self.nodes if n.op == "get_attr" and parameter_name(n).startswith(f"{prefix}.")]
        called = [node for node, call in self.calls.items() if call.module.startswith(f"{prefix}.")]
        readers = [user for node in own for user in node.users]
        end = 1 + max((self._index[node] for node in (*readers, *called)), default=-1)
        self._advance(min(end, self._index[before]))
        return end <= self._index[before]

    def _advance(self, end: int) -> None:
        for node in self.nodes[self.position : end]:
            if node.op == "get_attr":
                continue  # asked for when it is read
            self._hold(node)
            if node in self._constant:
                self._shared[node] = self._run(node, self._shared)
            else:
                for fp, q, batch in zip(self._fp, self._q, self.batches, strict=True):
                    fp[node] = batch if node.op == "placeholder" else self._kept(self._run(node, fp))
                    q[node] = self._kept(self._run_quantized(node, q, batch))
            self._free(self._index[node])
        self.position = max(self.position, end)

    def _hold(self, node: Node) -> None:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in self._shared:
                self._shared[source] = self._values(self.gm, source)

    def pairs(self, node: Node) -> Iterator[tuple[Tensor, Tensor]]:
        """Give a node's values in the fp and in the quantized stream, batch by batch, as [tokens, channels]."""
        for fp, q in self.values(node):
            yield fp.flatten(0, -2), q.flatten(0, -2)

    def values(self, node: Node) -> Iterator[tuple[Tensor, Tensor]]:
        """Give a node's values in the fp and in the quantized stream, batch by batch, shaped as they are."""
        for fp, q in zip(self._fp, self._q, strict=True):
            yield fp[node], q[node]

    def computed(self, node: Node) -> bool:
        """Whether a node has run and its values are still there."""
        return node in self._fp[0]

    def finish(self, batch: int, node: Node, value: Any) -> Any:
        """Return the graph's first output in the fp stream on one batch, given the value of a node not yet run.

        Nothing is kept: the streams stay where they are.
        """
        env = {**self._fp[batch], node: value}
        for later in self.nodes[self._index[node] + 1 :]:
            if later.op == "output":
                return self._look(next(iter(later.all_input_nodes)), env)
            env[later] = self._run(later, env)
        return value

    def _run(self, node: Node, env: Mapping[Node, Any]) -> Any:
        if node.op == "get_attr":
            return self._values(self.gm, node)
        if node.op == "output":
            return None
        assert callable(node.target)
        look = partial(self._look, env=env)
        return node.target(*map_arg(node.args, look), **map_arg(node.kwargs, look))

    def _look(self, node: Node, env: Mapping[Node, Any]) -> Any:
        if node in env:
            return env[node]
        return self._shared[node] if node in self._shared else self._values(self.gm, node)

    def _run_quantized(self, node: Node, env: dict[Node, Any], batch: Tensor) -> Any:
        if node.op == "placeholder":
            return batch
        call = self.calls.get(node)
        if call is not None and call.module in self.replaced:
            module, x = self.model.get_submodule(call.module), env[call.source]
            return self._run_experts(module, call, x, env) if call.experts else module(x)
        return self._run(node, env)

    def _run_experts(self, module: nn.Module, call: Call, x: Tensor, env: Mapping[Node, Any]) -> Tensor:
        rows = x.flatten(0, -2)
        offsets = None if call.offsets is None else env[call.offsets]
        y: Tensor = module(rows, experts_of(rows, offsets, call.experts))
        return y.view(*x.shape[:-1], y.shape[-1])

    def _free(self, done: int) -> None:
        dead = [node for node in (*self._fp[0], *self._shared) if self._last_use[node] <= done]
        for env in (*self._fp, *self._q, self._shared):
            for node in dead:
                env.pop(node, None)


def experts_of(rows: Tensor, offsets: Tensor | None, n_experts: int) -> Tensor:
    """Return the expert [N] of each row [N, in]: sorted by expert up to offsets [E], or in equal parts without."""
    if offsets is None:
        return experts_of_batches(n_experts, rows)
    return experts_of_rows(offsets, rows)


def residual_operand(node: Node) -> Node | None:
    """Return what a linear's output is added to, where it is added to something through layout alone."""
    current = node
    while len(current.users) == 1:
        user = next(iter(current.users))
        if user.target in ops.SAME | ops.VIEW:
            current = user
        elif user.target is torch.ops.aten.add.Tensor and len(user.all_input_nodes) == 2:
            return next(n for n in user.all_input_nodes if n is not current)
        else:
            return None
    return None

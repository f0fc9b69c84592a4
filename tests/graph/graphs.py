"""Small graphs built operation by operation, planned, folded, rotated by Haar matrices, and run again in float64."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from transformers.pytorch_utils import Conv1D

from bwla_compiler.graph.capture import PREFIX
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.passes.base import PassContext
from bwla_compiler.passes.fold_norms import FoldNorms
from bwla_compiler.passes.fold_rotations import FoldRotations
from bwla_compiler.passes.pipeline import run_pass
from bwla_compiler.passes.untie import Untie
from bwla_compiler.recipe import load_recipe

aten = torch.ops.aten

N_IDS = 16
BATCH, LENGTH = 2, 3
EPS = 0.1
"""Of norms: large, so that rounding is not amplified."""


class Builder:
    """A graph of ATen nodes over the parameters of `root`, each node run as it is added (meta["val"] is real)."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.root = nn.Module()
        self.graph = Graph()
        self.ids = self.graph.placeholder("input_ids")
        shape = (BATCH, LENGTH)
        self.ids.meta["val"] = torch.randint(0, N_IDS, shape, generator=self.generator)
        self.biasless: dict[Node, str] = {}
        self._n_names = 0

    # ---- parameters

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def add_module(self, module: nn.Module) -> str:
        name = f"m{self._n_names}"
        self._n_names += 1
        self.root.add_module(name, module)
        return name

    def attribute(self, name: str) -> Node:
        """Read a parameter or buffer of the root."""
        owner, _, leaf = name.rpartition(".")
        node = self.graph.create_node("get_attr", PREFIX + name)
        node.meta["val"] = getattr(self.root.get_submodule(owner), leaf).detach()
        return node

    def parameter(self, value: Tensor) -> Node:
        """A parameter of a module of its own, as a norm's gain is."""
        holder = nn.Module()
        holder.register_parameter("weight", nn.Parameter(value))
        return self.attribute(f"{self.add_module(holder)}.weight")

    def buffer(self, value: Tensor) -> Node:
        holder = nn.Module()
        holder.register_buffer("held", value)
        return self.attribute(f"{self.add_module(holder)}.held")

    # ---- operations

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Append one operation and run it."""
        value = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = target(*value[0], **value[1])
        return node

    def embed(self, width: int) -> Node:
        table = nn.Embedding(N_IDS, width, dtype=torch.float64)
        table.weight.data.copy_(self.random(N_IDS, width))
        return self.call(aten.embedding.default, self.attribute(f"{self.add_module(table)}.weight"), self.ids)

    def new_linear(self, n_in: int, n_out: int, *, bias: bool = True) -> str:
        linear = nn.Linear(n_in, n_out, bias=bias, dtype=torch.float64)
        linear.weight.data.copy_(self.random(n_out, n_in) / math.sqrt(n_in))
        return self.add_module(linear)

    def linear(self, x: Node, n_out: int = 0, *, bias: bool = True, module: str = "") -> Node:
        """y = x W^T + b with a linear of its own, or with one that exists."""
        module = module or self.new_linear(shape(x)[-1], n_out, bias=bias)
        held = self.root.get_submodule(module)
        args = [x, self.attribute(f"{module}.weight")]
        if getattr(held, "bias", None) is not None:
            args.append(self.attribute(f"{module}.bias"))
        node = self.call(aten.linear.default, *args)
        if len(args) == 2:
            self.biasless[node] = module
        return node

    def conv1d(self, x: Node, n_out: int) -> Node:
        """GPT-2's linear: addmm over rows, weight [in, out]."""
        module = Conv1D(n_out, shape(x)[-1]).to(torch.float64)
        module.weight.data.copy_(self.random(*module.weight.shape) / math.sqrt(shape(x)[-1]))
        module.bias.data.copy_(self.random(n_out))
        name = self.add_module(module)
        rows = self.call(aten.reshape.default, x, [-1, shape(x)[-1]])
        bias, weight = self.attribute(f"{name}.bias"), self.attribute(f"{name}.weight")
        return self.call(aten.view.default, self.call(aten.addmm.default, bias, rows, weight), [*shape(x)[:-1], n_out])

    def matmul_weight(self, x: Node, n_out: int) -> Node:
        """Falcon's linear: x @ W^T spelled out."""
        name = self.new_linear(shape(x)[-1], n_out, bias=False)
        turned = self.call(aten.permute.default, self.attribute(f"{name}.weight"), [1, 0])
        node = self.call(aten.matmul.default, x, turned)
        self.biasless[node] = name
        return node

    def rms(self, x: Node) -> Node:
        """x * rsqrt(mean(x^2) + eps), spelled out."""
        mean = self.call(aten.mean.dim, self.call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
        return self.call(aten.mul.Tensor, x, self.call(aten.rsqrt.default, self.call(aten.add.Tensor, mean, EPS)))

    def finish(self, *results: Node) -> "Built":
        self.graph.output(tuple(results))
        holder = nn.Module()
        holder.add_module("model", self.root)
        return Built(self.root, GraphModule(holder, self.graph), self.ids.meta["val"], dict(self.biasless))


def shape(node: Node) -> list[int]:
    return list(node.meta["val"].shape)


class _Runner(Interpreter):
    """Runs a graph on the parameters that the root has now: untied heads and biases that folds have made included."""

    def __init__(self, built: "Built") -> None:
        super().__init__(built.gm)
        self.built = built

    def fetch_attr(self, target: str) -> Any:
        owner, _, leaf = target.removeprefix(PREFIX).rpartition(".")
        return getattr(self.built.root.get_submodule(owner), leaf)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        module = self.built.biasless.get(n)
        bias = getattr(self.built.root.get_submodule(module), "bias", None) if module else None
        return result if bias is None else result + bias


class Built:
    """A finished graph, its parameters, and its input."""

    def __init__(self, root: nn.Module, gm: GraphModule, ids: Tensor, biasless: dict[Node, str]) -> None:
        self.root, self.gm, self.ids = root, gm, ids
        named = {node.name: module for node, module in biasless.items()}
        self.biasless = {node: named[node.name] for node in gm.graph.nodes if node.name in named}

    def run(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = _Runner(self).run(self.ids)
        assert isinstance(found, tuple)
        return found

    def plan(self) -> Plan:
        return make_plan(self.root, graph=self.gm)

    def error_after_rotations(self, *, seed: int = 0) -> tuple[float, Plan]:
        """Fold and rotate everything that the plan calls free; return the largest relative change of an output.

        Outputs below 0.01 are measured against 0.01: what is nothing but rounding has no relative error.
        """
        before = self.run()
        plan = self.plan()
        state = copy.deepcopy(self.root.state_dict())
        context = PassContext(self.root, plan, load_recipe("bwla-w1a16"), seed)
        for step in (Untie(), FoldNorms(), FoldRotations(kind="haar", every=True)):
            run_pass(self.root, step, context)
        after = self.run()
        assert state.keys() <= self.root.state_dict().keys()
        errors = [
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-2)) for a, b in zip(after, before, strict=True)
        ]
        return (math.nan if any(math.isnan(e) for e in errors) else max(errors)), plan


Middle = Callable[[Builder, Node], Node]


def around(middle: Middle, *, width: int = 8, seed: int = 0, readers: int = 1) -> Built:
    """ids -> embedding, a residual of one linear -> middle -> linears that read the result."""
    b = Builder(seed)
    x = b.embed(width)
    x = b.call(aten.add.Tensor, x, b.linear(x, width))
    y = middle(b, x)
    return b.finish(*(b.linear(y, 5, bias=False) for _ in range(readers)))

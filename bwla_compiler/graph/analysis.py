"""Basis analysis: which tensor axes may be rotated, decided by dataflow alone.

Every axis of every tensor carries a space (see `spaces`); parameters are no exception: an orthogonal matrix R
chosen for a space multiplies every parameter axis that lives in it, and the graph computes the same function.
Each operation has one rule that unifies or constrains the spaces of its operands. An operation without a rule
pins all it touches: never wrong, only left alone.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from bwla_compiler.errors import PlanError
from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.capture import held, parameter_name
from bwla_compiler.graph.spaces import Space, pin, pinned


@dataclass
class Value:
    """What is known of a tensor: a space per axis.

    squared: it holds squares of a rotated vector. items: of a list of tensors. lanes: where the second axis from the
    end numbers tensors that share a parameter and nothing else (a head's query, key and value): the last axis' space
    for each number, and then axes[-1] is the first of them.
    """

    axes: list[Space]
    squared: bool = False
    items: list["Value"] = field(default_factory=list)
    lanes: tuple[Space, ...] = ()


@dataclass(frozen=True)
class Site:
    """One use of a linear: node, its input, and the weight's parameter with its two axes.

    n_experts: matrices of a weight of three axes, 0 for a plain linear. offsets: the node that says where each expert's
    rows of the input end; None where every expert has as many rows.
    """

    node: Node
    source: Node
    weight: str
    bias: str | None
    in_axis: int
    out_axis: int
    n_experts: int = 0
    offsets: Node | None = None


@dataclass(frozen=True)
class Absorption:
    """A per-channel gain (and shift) read by linears alone, which can take it over.

    gain: its parameter; the gain is `gain_offset + parameter` (Gemma stores the gain less one).
    """

    node: Node
    source: Node
    gain: str | None
    gain_offset: float
    shift: str | None
    readers: tuple[Node, ...]


class Analysis:
    """The analysis of one captured graph by a table of rules; run at construction.

    Raises PlanError where sizes depend on data.

    values: per node. parameters: per parameter name, a space per axis. sites: linears in graph order.
    absorptions: norms whose affine part moves into the readers. kept: norms where it does not, and why.
    tied: parameters that serve both as embedding and as linear (the linear's use has a value of its own).
    unknown: operations without a rule. biasable: ids of the weights whose module adds a bias once it has one;
    untieable: ids of the embeddings that may part with the head they share a tensor with. None where that is not
    known, and then taken for granted.
    """

    def __init__(
        self,
        gm: GraphModule,
        rules: "Mapping[Any, Rule]",
        *,
        biasable: Collection[int] | None = None,
        untieable: Collection[int] | None = None,
    ) -> None:
        self.gm = gm
        self.rules = rules
        self.biasable, self.untieable = biasable, untieable
        self.values: dict[Node, Value] = {}
        self.parameters: dict[str, Value] = {}
        self.sites: dict[Node, Site] = {}
        self.embeddings: dict[Node, str] = {}
        self.absorptions: list[Absorption] = []
        self.kept: list[tuple[str, str]] = []
        self.tied: dict[str, str] = {}
        self.unknown: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._refuse_data_dependent_sizes()
        self.constant = self._constants()
        self._n_uses = self._count_uses()
        self.embedded = {
            name for n in gm.graph.nodes if n.target in ops.EMBEDDING and (name := self.parameter_of(n.args[0]))
        }
        for node in gm.graph.nodes:
            self._step(node)

    # ---- reading the graph

    def _refuse_data_dependent_sizes(self) -> None:
        for node in self.gm.graph.nodes:
            if free_unbacked_symbols(node.meta.get("val")):
                raise PlanError(f"{node.name}: the sizes of what {node.target} gives depend on data, not on shapes")

    def _constants(self) -> set[Node]:
        """Nodes that do not depend on the graph's inputs."""
        found: set[Node] = set()
        for node in self.gm.graph.nodes:
            inputs = node.all_input_nodes
            computed = node.op == "call_function" and node.target not in ops.EMBEDDING
            if node.op == "get_attr" or (computed and all(i in found for i in inputs)):
                found.add(node)
        return found

    def _count_uses(self) -> dict[str, int]:
        """How many operations, embeddings and layout aside, read each parameter."""
        count: dict[str, int] = {}
        for node in self.gm.graph.nodes:
            if node.target in ops.LAYOUT | ops.EMBEDDING:
                continue
            for name in filter(None, map(self.parameter_of, node.all_input_nodes)):
                count[name] = count.get(name, 0) + 1
        return count

    def is_constant(self, argument: Any) -> bool:
        """Whether an argument does not depend on the graph's inputs (numbers included)."""
        return not isinstance(argument, Node) or argument in self.constant

    def value(self, argument: Any) -> Value | None:
        """What is known of an argument, None for what is no tensor of the graph."""
        return self.values.get(argument) if isinstance(argument, Node) else None

    def shape(self, node: Node) -> list[int]:
        """Sizes of a node's tensor."""
        return [int(s) for s in node.meta["val"].shape]

    def is_tensor(self, node: Any) -> bool:
        """Whether a node gives one tensor."""
        return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)

    def parameter_of(self, argument: Any) -> str | None:
        """Name of the parameter that a node is, through layout operations alone."""
        node = argument
        while isinstance(node, Node) and node.target in ops.LAYOUT:
            node = node.args[0]
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        tensor = held(self.gm, node)
        if not isinstance(tensor, torch.nn.Parameter):
            return None
        # two names of one tied tensor are one parameter
        return self._names.setdefault(id(tensor), parameter_name(node))

    def number_of(self, node: Node) -> Tensor | None:
        """Return the numbers that a constant index holds, through layout alone; None where it is computed."""
        while node.target in ops.LAYOUT:
            node = node.all_input_nodes[0]
        found = held(self.gm, node) if node.op == "get_attr" else None
        return found if isinstance(found, Tensor) and not found.is_meta else None

    def linear_operands(self, node: Any) -> tuple[Node, Node, Any, bool] | None:
        """Return (input, weight, bias, transposed) where a node is a linear, transposed: weight [.., in, out]."""
        args = node.args
        if node.target in ops.LINEAR and self.is_constant(args[1]):
            return args[0], args[1], args[2] if len(args) > 2 else None, False
        if node.target in ops.ADDMM and self.is_constant(args[2]) and self.is_constant(args[0]) and not node.kwargs:
            return args[1], args[2], args[0], True
        reads_constant = node.target in ops.MATMUL and self.is_constant(args[1]) and not self.is_constant(args[0])
        if reads_constant and len(self.shape(args[1])) == 2:
            return args[0], args[1], None, True
        if str(node.target) in ops.GROUPED and self.is_constant(args[1]) and not self.is_constant(args[0]):
            rows, weights = len(self.shape(args[0])), len(self.shape(args[1]))
            return (args[0], args[1], None, True) if (rows, weights) == (2, 3) else None
        return None

    # ---- walking it

    def _step(self, node: Node) -> None:
        if node.target in ops.SHAPE_ONLY:
            return
        if node.op == "get_attr":
            if isinstance(held(self.gm, node), Tensor):  # a subgraph of a higher-order operation is none
                self.values[node] = self._parameter_value(node)
        elif node.op == "placeholder":
            self.fresh(node, "graph input")
        elif node.op == "output":
            for source in node.all_input_nodes:
                self.pin_all(source, "graph output")
        else:
            self._guard_squares(node)
            rule = self.rules.get(node.target) or self.rules.get(str(node.target))
            if rule is None or not rule(self, node):
                self._unsupported(node)

    def _parameter_value(self, node: Node) -> Value:
        name = self.parameter_of(node)
        if name is None:
            return Value([pinned(s, "buffer") for s in self.shape(node)])
        if name not in self.parameters:
            self.parameters[name] = Value([Space(s) for s in self.shape(node)])
        return self.parameters[name]

    def _guard_squares(self, node: Node) -> None:
        """Squares may only be averaged or summed over; anything else sees single channels."""
        if node.target in ops.REDUCTION or node.target in ops.SAME:
            return
        for source in node.all_input_nodes:
            if source in self.values and self.values[source].squared:
                self.pin_all(source, f"{node.name}: reads squares one by one")

    def fresh(self, node: Node, reason: str) -> None:
        """Give what a node computes, one tensor or several, the identity on every axis."""
        result = node.meta.get("val")
        if isinstance(result, (tuple, list)):
            tensors = [r for r in result if isinstance(r, Tensor)]
            self.values[node] = Value([], items=[Value([pinned(int(s), reason) for s in t.shape]) for t in tensors])
        elif self.is_tensor(node):
            self.values[node] = Value([pinned(s, reason) for s in self.shape(node)])

    def pin_all(self, node: Node, reason: str) -> None:
        """Force the identity on every axis of a node's value."""
        value = self.values.get(node)
        for found in (value, *value.items) if value else ():
            for axis in (*found.axes, *found.lanes):
                pin(axis, reason)

    def opaque(self, node: Node, reason: str) -> None:
        """Force the identity on all that an operation reads and writes."""
        for source in node.all_input_nodes:
            self.pin_all(source, reason)
        self.fresh(node, reason)

    def _unsupported(self, node: Node) -> None:
        if node not in self.constant:
            self.unknown[str(node.target)] = self.unknown.get(str(node.target), 0) + 1
        self.opaque(node, f"{node.name}: {node.target} has no rule")

    # ---- who reads a normed tensor

    def linear_readers(self, node: Any) -> tuple[Node, ...] | str:
        """Return the linears that alone read a tensor's last axis through layout, or the name of who else does."""
        readers: list[Node] = []
        for user in node.users:
            if user.target in ops.SHAPE_ONLY | ops.FILL:
                continue
            if self._passes_channels(user, node):
                below = self.linear_readers(user)
                if isinstance(below, str):
                    return below
                readers.extend(below)
            elif self._reads_weight(user, node):
                readers.append(user)
            else:
                return f"also read by {user.name}"
        return tuple(readers) if readers else "read by nothing"

    def _passes_channels(self, user: Node, source: Node) -> bool:
        """Whether what `user` gives has the channels of `source` for its own, in their order."""
        if not self.is_tensor(user) or user.args[0] is not source or source in user.all_input_nodes[1:]:
            return False
        if user.target in ops.SAME:
            return True
        channels = self.shape(source)[-1:]
        if self.shape(user)[-1:] != channels or user.target not in _KEEP_LAST:
            return False
        indices: Any = user.args[1] if user.target in ops.INDEX else ()
        return len(indices) < len(self.shape(source))  # the last axis is not among the indexed

    def _reads_weight(self, user: Node, source: Node) -> bool:
        """Whether `user` is a linear with a parameter that no other operation reads, and `source` its input alone."""
        operands = self.linear_operands(user)
        if operands is None or operands[0] is not source or operands[2] is source:
            return False
        weight = operands[1]
        name = self.parameter_of(weight)
        while weight.target in ops.SAME | ops.PERMUTE:
            weight = weight.all_input_nodes[0]
        if name is None or weight.op != "get_attr" or self._n_uses[name] != 1:
            return False
        return name not in self.embedded or self.may_untie(name)

    def may_untie(self, name: str) -> bool:
        """Whether the linear that an embedding's tensor serves may get a copy of its own."""
        return self.untieable is None or self._id_of(name) in self.untieable

    def _id_of(self, name: str) -> int:
        return next(key for key, found in self._names.items() if found == name)

    def without_bias(self, readers: Collection[Node]) -> str:
        """Return why a shift cannot move into linears: the name of one that would not add a bias; "" if all would."""
        for reader in readers:
            operands = self.linear_operands(reader)
            assert operands is not None
            name = self.parameter_of(operands[1])
            assert name is not None
            if self.biasable is not None and self._id_of(name) not in self.biasable:
                return f"also read by {reader.name}, which takes no bias"
            if operands[2] is not None:
                bias = self.parameter_of(operands[2])
                if bias is None or self._n_uses[bias] != 1:
                    return f"also read by {reader.name}, whose bias is not its own"
        return ""

    def gain_parameter(self, node: Node) -> tuple[str, float] | None:
        """Return (parameter, offset) where a constant is offset + parameter, and nothing else reads the parameter."""
        offset, source = 0.0, node
        while source.op != "get_attr":
            added = _number_added(source)
            if added is None or len(source.users) != 1:
                return None
            offset += added
            source = source.all_input_nodes[0]
        name = self.parameter_of(source)
        if name is None or len(source.users) != 1 or self._n_uses[name] != 1 or name in self.embedded:
            return None
        in_order = sum(s > 1 for s in self.shape(source)) <= 1
        return (name, offset) if in_order else None


def _number_added(node: Node) -> float | None:
    """Return the number that a node adds to the one tensor it reads, 0 for layout; None where it does more."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.target in ops.LAYOUT:
        return 0.0
    number = node.args[1] if node.target in ops.SUM - ops.REVERSED else None
    if not isinstance(number, int | float) or len(node.args) > 2 or node.kwargs:  # alpha
        return None
    return -float(number) if "sub" in str(node.target) else float(number)


_KEEP_LAST = ops.VIEW | ops.UNSQUEEZE | ops.SQUEEZE | ops.EXPAND | ops.INDEX | ops.SLICE
"""Operations that leave the last axis as it is where they leave its size as it is, earlier indices at least."""


Rule = Callable[[Analysis, Any], bool]
"""What one operation does to spaces; a rule that returns False leaves the node to `Analysis.unsupported`."""


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Return an operation's argument by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def aligned(value: Value | None, rank: int) -> list[Space]:
    """Axes of an operand, padded on the left to `rank` as broadcasting does."""
    axes = list(value.axes) if value else []
    return [pinned(1, "broadcast")] * (rank - len(axes)) + axes

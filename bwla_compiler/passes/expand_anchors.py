"""ExpandAnchors and CollapseAnchors: calls that name a module by its anchor, as calls that name its tensors, and back.

Between the two stand the passes that fuse. A tensor is a node `bwla.part` there, computed by no one in the end: a
routine finds it by the anchor's place among the arguments and its name.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Graph, Node

from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.packed_calls import OPS, PART
from bwla_compiler.passes.routine_calls import has_known_inputs
from bwla_compiler.runtime.anchors import LINEAR_PARTS, NORM_PARTS, TRANSFORM_PARTS, fake_part, parts


@dataclass(frozen=True)
class _Pair:
    """An operator that takes an anchor (of), and the one that takes the tensors of these names (plain).

    others: how many operands more both have; before: how many of the tensors stand before these.
    """

    of: Any
    plain: Any
    names: tuple[str, ...]
    before: int
    others: int


_PAIRS = (
    _Pair(OPS.linear_of.default, OPS.linear.default, LINEAR_PARTS, 7, 1),
    _Pair(OPS.transform_of.default, OPS.transform.default, TRANSFORM_PARTS, 6, 0),
    _Pair(OPS.prologue_of.default, OPS.prologue.default, NORM_PARTS, 0, 2),
)
_BY_OF, _BY_PLAIN = {pair.of: pair for pair in _PAIRS}, {pair.plain: pair for pair in _PAIRS}


class ExpandAnchors:
    """Make `bwla.linear` of `bwla.linear_of`, `bwla.transform` of `bwla.transform_of` and so on, in place."""

    name: ClassVar[str] = "expand-anchors"

    def run(self, graph: Graph) -> PassReport:
        """Rewrite in place; the report lists the calls. Where no routine can be made of them, they stay as they are."""
        report = PassReport(self.name)
        calls = [node for node in graph.nodes if node.target in _BY_OF]
        known = has_known_inputs(graph)
        made = _Parts(graph)
        for call in calls:
            pair, (x, anchor, facts, *others) = _BY_OF[call.target], call.args
            if not known or anchor.op != "placeholder" or not isinstance(x.meta["val"].shape[-1], int):
                report.skip(call.name, "the graph's inputs are not those of its program, or its channels are not fixed")
                continue
            tensors = [made.part(anchor, name, facts) for name in pair.names]
            call.target, call.args = pair.plain, (x, *tensors[: pair.before], *others, *tensors[pair.before :])
            report.changed.append((call.name, f"{sum(one is not None for one in tensors)} tensors"))
        return report


class CollapseAnchors:
    """Undo ExpandAnchors for the calls that no other pass took, in place."""

    name: ClassVar[str] = "collapse-anchors"

    def run(self, graph: Graph) -> PassReport:
        """Rewrite in place; the report lists the calls."""
        report = PassReport(self.name)
        for call in graph.nodes:
            pair = _BY_PLAIN.get(call.target)
            found = [value for value in call.args[1:] if isinstance(value, Node)]
            if pair is None or not found or any(value.target is not PART for value in found):
                continue
            anchor, _, facts = found[0].args
            others = call.args[1 + pair.before : 1 + pair.before + pair.others]
            call.target, call.args = pair.of, (call.args[0], anchor, facts, *others)
            report.changed.append((call.name, "as it was"))
        for node in reversed(graph.nodes):
            if node.target is PART and not node.users:
                graph.erase_node(node)
        return report


class _Parts:
    """The nodes of the tensors of a graph's anchored modules, one each, behind its inputs."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._made = graph, dict[tuple[Node, str], Node]()
        self._after = next((node for node in reversed(graph.nodes) if node.op == "placeholder"), None)

    def part(self, anchor: Node, name: str, facts: str) -> Node | None:
        """Return the node of this tensor; None where the module holds none."""
        if name not in parts(facts):
            return None
        if (anchor, name) not in self._made:
            assert self._after is not None
            with self._graph.inserting_after(self._after):
                node = self._graph.call_function(PART, (anchor, name, facts))
            node.meta["val"] = fake_part(anchor.meta["val"], name, facts)
            self._made[anchor, name] = node
        return self._made[anchor, name]

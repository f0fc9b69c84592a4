"""The plan as a networkx graph: parameters, bases and transforms as nodes, who writes and who reads as edges.

Chains (linears tied together by the bases that they share) are connected components of its axes.
"""

import io
from collections.abc import Iterator

import networkx as nx

from bwla_compiler.graph.plan import Expression, Linear, Plan

BASIS = "basis:"
"""Before the name of a basis, which may also be that of a module."""

TRANSFORM = "transform:"
"""Before the name of a group whose input is turned at run time, wholly or in part."""


def plan_network(plan: Plan) -> nx.DiGraph:
    """Return the plan as a graph whose attributes are texts and numbers alone.

    Nodes, by `kind`: "linear", "embedding" and "norm", named by their parameter; "basis" and "transform", see BASIS
    and TRANSFORM. Edges, by `role`: "writes" (parameter -> basis), "reads" (basis -> linear, or basis -> transform ->
    linear), "gain" (norm -> linear that takes it over). A basis and the edges at it carry the number of their `chain`.
    Order and content depend on the plan alone.
    """
    graph = nx.DiGraph(model=plan.model)
    of_basis = {basis: number for number, found in enumerate(chains(plan)) for basis in found}
    for basis in plan.bases:
        graph.add_node(
            BASIS + basis.name,
            kind="basis",
            size=basis.size,
            freedom=basis.freedom,
            reason=basis.reason,
            chain=of_basis.get(basis.name, -1),
        )
    for table in plan.embeddings:
        graph.add_node(table.parameter, kind="embedding", module=table.name, size=table.output.size)
        _connect(graph, table.output, of_basis, writer=table.parameter)
    for linear in plan.linears:
        _add_linear(graph, linear, of_basis)
    _add_norms(graph, plan)
    return graph


def _add_linear(graph: nx.DiGraph, linear: Linear, chains: dict[str, int]) -> None:
    graph.add_node(
        linear.parameter,
        kind="linear",
        module=linear.name,
        block=linear.block,
        in_features=linear.in_features,
        out_features=linear.out_features,
        decision=linear.decision,
        reason=linear.reason,
    )
    reader = linear.parameter
    if linear.decision in ("partial", "online"):
        transform = TRANSFORM + linear.group
        graph.add_node(transform, kind="transform", decision=linear.decision, size=linear.in_features)
        graph.add_edge(transform, reader, role="reads")
        reader = transform
    _connect(graph, linear.input, chains, reader=reader)
    _connect(graph, linear.output, chains, writer=linear.parameter)


def _connect(
    graph: nx.DiGraph, axis: Expression, chains: dict[str, int], *, writer: str = "", reader: str = ""
) -> None:
    for name in dict.fromkeys(leaf.basis for leaf in axis.leaves() if leaf.basis):
        ends = (writer, BASIS + name) if writer else (BASIS + name, reader)
        graph.add_edge(*ends, role="writes" if writer else "reads", chain=chains[name])


def _add_norms(graph: nx.DiGraph, plan: Plan) -> None:
    for norm in plan.norms:
        name = norm.gain or norm.shift
        if name is None:
            continue
        graph.add_node(name, kind="norm", reason=norm.reason)
        for reader in norm.absorbed_by:
            graph.add_edge(name, plan.linear(reader).parameter, role="gain")


def chains(plan: Plan) -> tuple[tuple[str, ...], ...]:
    """Return the chains, each the names of its bases: bases that no axis shares are of different chains.

    A chain may be rotated by itself. Fused weights (q, k and v in one) put several bases on one axis.
    """
    graph = nx.Graph()
    for basis in plan.free:
        graph.add_node(BASIS + basis.name)
    for (parameter, axis), names in _free_axes(plan):
        graph.add_edges_from((f"{parameter}#{axis}", BASIS + name) for name in names)
    components = {min(c): c for c in nx.connected_components(graph)}
    order = [BASIS + basis.name for basis in plan.free]
    found = {node: key for key, nodes in components.items() for node in nodes}
    together: dict[str, list[str]] = {}
    for node in order:
        together.setdefault(found[node], []).append(node.removeprefix(BASIS))
    return tuple(map(tuple, together.values()))


def _free_axes(plan: Plan) -> Iterator[tuple[tuple[str, int], list[str]]]:
    """Yield each axis of a parameter with the free bases that it lives in."""
    free = {basis.name for basis in plan.free}
    for axis in plan.axes:
        names = [leaf.basis for leaf in axis.expression.leaves() if leaf.basis in free]
        if names:
            yield (axis.parameter, axis.axis), names


def to_graphml(plan: Plan) -> str:
    """Return the plan's graph as GraphML, which Gephi, yEd and networkx read."""
    out = io.BytesIO()
    nx.write_graphml_xml(plan_network(plan), out)
    return out.getvalue().decode("utf-8")

"""The plan as a graph: nodes, edges, chains, and GraphML that networkx reads back."""

import io

import networkx as nx
import pytest

from bwla_compiler.graph.network import BASIS, TRANSFORM, chains, plan_network, to_graphml
from bwla_compiler.graph.plan import Plan
from tests import planned

ATTENTION = "model.layers.0.self_attn."
MLP = "model.layers.0.mlp."


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned.plan("llama-tied")


def test_nodes_are_parameters_bases_and_transforms(plan: Plan) -> None:
    graph = plan_network(plan)
    kinds = dict(graph.nodes(data="kind"))
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds[f"{MLP}down_proj.weight"] == "linear"
    assert kinds["model.norm.weight"] == "norm"
    assert kinds[f"{BASIS}residual"] == "basis"
    transforms = {name for name, kind in kinds.items() if kind == "transform"}
    assert transforms == {
        f"{TRANSFORM}model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    linears = {name for name, kind in kinds.items() if kind == "linear"}
    assert linears == {linear.parameter for linear in plan.linears}
    assert None not in kinds.values()  # an edge has made no node of its own


def test_edges_say_who_writes_and_reads(plan: Plan) -> None:
    graph = plan_network(plan)
    residual = f"{BASIS}residual"
    assert graph.edges["model.embed_tokens.weight", residual]["role"] == "writes"
    assert graph.edges[f"{MLP}down_proj.weight", residual]["role"] == "writes"
    assert graph.edges[residual, f"{MLP}up_proj.weight"]["role"] == "reads"
    value, turned = f"{BASIS}{ATTENTION}v_proj", f"{TRANSFORM}{ATTENTION}o_proj"
    assert list(nx.shortest_path(graph, f"{ATTENTION}v_proj.weight", f"{ATTENTION}o_proj.weight")) == [
        f"{ATTENTION}v_proj.weight", value, turned, f"{ATTENTION}o_proj.weight",
    ]  # fmt: skip
    assert graph.edges["model.norm.weight", "lm_head.weight"]["role"] == "gain"


def test_chains_are_connected_components(plan: Plan) -> None:
    found = chains(plan)
    assert found == (("residual",), *((f"model.layers.{i}.self_attn.v_proj",) for i in range(2)))
    graph = plan_network(plan)
    assert [graph.nodes[f"{BASIS}{name}"]["chain"] for (name,) in found] == [0, 1, 2]
    numbers = {data["chain"] for *_, data in graph.edges(f"{BASIS}residual", data=True)}
    assert numbers == {0}


def test_axes_of_several_bases_join_them() -> None:
    plan = planned.plan("gpt2")
    assert ("residual",) in chains(plan)
    assert sorted(name for chain in chains(plan) for name in chain) == sorted(basis.name for basis in plan.free)
    fused = [axis for axis in plan.axes if axis.parameter.endswith("c_attn.weight")]
    assert any(axis.expression.kind == "sum" for axis in fused)
    for axis in plan.axes:
        names = {leaf.basis for leaf in axis.expression.leaves()} & {basis.name for basis in plan.free}
        assert sum(not names.isdisjoint(chain) for chain in chains(plan)) == min(1, len(names))


def test_graphml_gives_the_graph_back(plan: Plan) -> None:
    graph = plan_network(plan)
    read = nx.read_graphml(io.BytesIO(to_graphml(plan).encode()))
    assert dict(read.nodes(data=True)) == dict(graph.nodes(data=True))
    assert list(read.edges(data=True)) == list(graph.edges(data=True))
    assert read.graph["model"] == "LlamaForCausalLM"

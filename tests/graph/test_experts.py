"""Experts in the plan: one entry a parameter, routers on purpose in float, groups, and what is not known."""

import pytest
import torch
from bwla_compiler.evaluate.zoo.models import tiny_model
from torch import nn

from bwla_compiler.graph.basis import analyse
from bwla_compiler.graph.capture import capture
from bwla_compiler.graph.experts import experts_form, experts_of_batches, experts_of_rows, sorting_of
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import make_plan

FAMILIES = ("mixtral", "gpt_oss", "llama4_text")


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: make_plan(tiny_model(name)) for name in FAMILIES}


@pytest.mark.parametrize(
    ("name", "decisions"),
    [
        ("mixtral", ("folded", "online")),
        ("gpt_oss", ("folded", "online")),
        ("llama4_text", ("online", "online")),  # its tokens are repeated, an operation without a rule
    ],
)
def test_each_parameter_of_experts_is_a_linear(name: str, decisions: tuple[str, str], plans: dict[str, Plan]) -> None:
    experts = [x for x in plans[name].linears if x.experts]
    assert len(experts) == 4  # two of each of two layers
    for linear in experts:
        assert linear.name == linear.parameter
        assert linear.decision == decisions[linear.name.endswith("down_proj")]
        assert linear.group == linear.name
        sizes = (96, 64) if linear.name.endswith("down_proj") else (64, 192)
        assert (linear.experts, linear.in_features, linear.out_features) == (4, *sizes)
        assert linear.n_weights == 4 * sizes[0] * sizes[1]
        axes = {linear.in_axis, linear.out_axis}
        assert axes == {1, 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_routers_are_left_alone_on_purpose(name: str, plans: dict[str, Plan]) -> None:
    alone = [x for x in plans[name].linears if x.decision == "alone"]
    assert {x.name.rpartition(".")[2] for x in alone} <= {"gate", "router"}
    assert len(alone) == 2
    assert all(x.reason.startswith("a router: kept in float on purpose") for x in alone)


def test_a_rotation_reaches_the_router(plans: dict[str, Plan]) -> None:
    rotated = {axis.parameter for axis in plans["mixtral"].axes if "residual" in str(axis.expression)}
    assert {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.gate_up_proj"} <= rotated


def test_no_group_is_named_after_a_router(plans: dict[str, Plan]) -> None:
    """A transform stands before the linears that a group is named after, and none before a router."""
    plan = plans["llama4_text"]
    assert all(group.name in group.linears for group in plan.groups)


def test_a_plan_with_experts_survives_json(plans: dict[str, Plan]) -> None:
    assert Plan.from_json(plans["mixtral"].to_json()) == plans["mixtral"]


class Unknown(nn.Module):
    """Experts that no form fits: every token goes to every expert."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.up = nn.Parameter(torch.randn(3, 16, 16))
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        rows = self.embed(input_ids).flatten(0, 1).unsqueeze(0).expand(3, -1, -1)
        result: torch.Tensor = self.head(torch.bmm(rows, self.up).sum(0).view(*input_ids.shape, -1))
        return result


def test_experts_of_unknown_ways_are_left_alone_with_a_reason() -> None:
    plan = make_plan(Unknown())
    (up,) = [x for x in plan.linears if x.experts]
    assert up.decision == "alone"
    assert up.reason == "its weight belongs to a Unknown, whose way of calling its experts is not known"
    assert experts_form(Unknown()) == ""


def test_the_order_of_sorted_rows_is_found() -> None:
    analysis = analyse(capture(tiny_model("mixtral"), batch=2, length=5))
    found = [sorting_of(site.offsets) for site in analysis.sites.values() if site.offsets is not None]
    assert len(found) == 4
    assert all(x is not None and x[1] == 2 and tuple(x[0].meta["val"].shape) == (20,) for x in found)


def test_rows_know_their_expert() -> None:
    rows = torch.ones(6, 2)
    assert experts_of_rows(torch.tensor([2, 2, 5], dtype=torch.int32), rows).tolist() == [0, 0, 2, 2, 2, 3]
    rows[1] = 0
    assert experts_of_batches(3, rows).tolist() == [0, 3, 1, 1, 2, 2]

"""When a plan's folds are legal in another graph of the same model, and the plan that folds nothing."""

import dataclasses

import pytest
from torch import Tensor, nn

from bwla_compiler.graph.agreement import disagreement, without_folds
from bwla_compiler.graph.capture import _normal_form, capture
from bwla_compiler.graph.plan import Basis, Plan
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.passes.fold_rotations import FoldRotations
from bwla_compiler.tokens import evaluating
from tests import tiny
from tests.backend import small


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small.llama(tied=True)


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return make_plan(model, graph=capture(model, cache=True))


def present(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def reason(plan: Plan, seen: Plan, model: nn.Module, *, without: str = "") -> str:
    rotated = {b.name for b in plan.bases if FoldRotations().refusal(b) == ""}
    return disagreement(plan, seen, bases=rotated, present={n for n in present(model) if n != without})


class Hidden(nn.Module):
    """Logits, and the hidden state that the head reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden), hidden


def test_a_plan_agrees_with_itself_and_with_the_graph_without_a_cache(model: nn.Module, plan: Plan) -> None:
    assert reason(plan, plan, model) == ""
    assert reason(plan, make_plan(model), model) == ""


def test_a_graph_that_shows_the_stream_forbids_its_rotation(model: nn.Module, plan: Plan) -> None:
    with evaluating(model):
        seen = make_plan(model, graph=_normal_form(Hidden(model), (tiny.ids(),), {}, name="Hidden"))
    assert reason(plan, seen, model) != ""
    assert reason(without_folds(plan, reason="a test"), seen, model) == ""


def test_a_cache_forbids_what_only_a_graph_without_one_grants(model: nn.Module, plan: Plan) -> None:
    free = make_plan(model)
    assert any("v_proj" in basis.name for basis in free.free)
    assert "v_proj" in reason(free, plan, model)


def test_each_part_is_compared(model: nn.Module, plan: Plan) -> None:
    (norm, *norms), (linear, *linears) = plan.norms, plan.linears
    alone = dataclasses.replace(linear, decision="alone")
    fewer = dataclasses.replace(norm, absorbed_by=norm.absorbed_by[1:])
    assert "is no plain linear" in reason(plan, dataclasses.replace(plan, linears=(alone, *linears)), model)
    assert "read by more than its linears" in reason(plan, dataclasses.replace(plan, norms=(fewer, *norms)), model)
    assert "share a tensor" in reason(plan, dataclasses.replace(plan, tied=()), model)
    axes = tuple(a for a in plan.axes if a.parameter != linear.parameter)
    assert linear.parameter in reason(plan, dataclasses.replace(plan, axes=axes), model)
    # a graph that does not read the parameter at all has no say
    assert reason(plan, dataclasses.replace(plan, axes=axes), model, without=linear.parameter) == ""


def test_less_freedom_is_too_little(model: nn.Module, plan: Plan) -> None:
    def with_freedom(basis: Basis) -> Basis:
        return dataclasses.replace(basis, freedom="fixes-ones", reason="mean") if basis.name == "residual" else basis

    seen = dataclasses.replace(plan, bases=tuple(map(with_freedom, plan.bases)))
    assert reason(plan, seen, model) == "the basis residual is fixes-ones in this graph: mean"
    assert reason(seen, plan, model) == ""


def test_without_folds_each_linear_turns_its_own_input(plan: Plan) -> None:
    bare = without_folds(plan, reason="a test")
    assert (bare.bases, bare.norms, bare.axes) == ((), (), ())
    assert [x.name for x in bare.linears] == [x.name for x in plan.linears]
    assert {x.decision for x in bare.linears} == {"online"}
    assert bare.groups == plan.groups
    assert without_folds(bare, reason="a test") == bare

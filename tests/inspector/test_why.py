"""One linear in full sentences: what pinned it, what would free it; names that are not there are answered kindly."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from bwla_compiler.cost.model import GroupShape, ModelShape
from bwla_compiler.errors import PlanError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.cost import cost_report
from bwla_compiler.inspector.formats import Format
from bwla_compiler.inspector.report import build_report
from bwla_compiler.inspector.why import REFUSALS, REMEDIES, explain
from bwla_compiler.numerics.spread import Spread, Tails, WeightSpread
from bwla_compiler.spec import LinearSpec


def test_an_online_linear_names_the_operation_and_the_remedy(plan: Plan) -> None:
    text = explain(build_report(plan), "layers.1.mlp.down_proj")
    assert text.startswith("model.layers.1.mlp.down_proj takes 12 channels to 8. It is online:")
    assert "No part of its 12 input channels may be rotated beforehand." in text
    assert "pinned by the operation silu_1, which acts on each channel by itself." in text
    assert "transform.online = false" in text


def test_a_partial_linear_shows_both_factors(plan: Plan) -> None:
    reason = "the factor of 2 is pinned by sdpa_1: attention works head by head; the rest folds"
    linears = tuple(
        dataclasses.replace(x, reason=reason)
        if x.name == "model.layers.1.o_proj" else x
        for x in plan.linears
    )  # fmt: skip
    text = explain(build_report(dataclasses.replace(plan, linears=linears)), "layers.1.o_proj")
    assert "Its input is (1[2] x model.layers.1.v_proj)" in text
    assert "written by model.layers.1.v_proj" in text
    assert "A factor of it was pinned by the operation sdpa_1, which works head by head." in text


def test_a_folded_linear_says_who_shares_its_input_and_whose_gain_it_takes(plan: Plan) -> None:
    text = explain(build_report(plan), "layers.0.k_proj")
    assert "Its input lives in the basis residual." in text
    assert "It shares its input with model.layers.0.v_proj" in text
    assert "It takes over model.layers.0.norm.weight" in text
    assert "Nothing holds it" in text


def test_a_linear_left_alone_says_why(plan: Plan) -> None:
    text = explain(build_report(plan), "layers.2.mlp.down_proj")
    assert "left as it is" in text
    assert "The reason: weight is not floating." in text


def test_format_cost_and_measurements_are_sentences(plan: Plan, quantized: Callable[[dict[str, float]], Any]) -> None:
    name = "model.layers.0.mlp.down_proj"
    outcome = quantized({name: 0.125})
    before, after = Tails(90.0, 30.0, 6, 0.2, 0.9, ()), Tails(3.0, 4.0, 6, 0.001, 0.1, ())
    spread = Spread(WeightSpread((1,), 0.33), WeightSpread((1,), 0.5), before, after)
    outcome = dataclasses.replace(outcome, linears=(dataclasses.replace(outcome.linears[0], spread=spread),))
    report = build_report(
        plan,
        outcome=outcome,
        formats={name: Format(1, "row", 4, 6, 1.4, "scaling, kronecker 3 x 4")},
        cost=cost_report(ModelShape((GroupShape("down_proj", LinearSpec(12, (8,)), 2),)), chosen="a100-sxm"),
    )
    text = explain(report, name)
    assert "stored as one bit a weight with a scale for each row, beside an int8 pair of rank 4" in text
    assert "goes through scaling, kronecker 3 x 4." in text
    assert "Modelled on a100-sxm" in text
    assert "took 1.25 bits a weight and lost 12.5% of the energy of its output" in text
    assert "went from 0.330 to 0.500" in text
    assert "was 30.0 times its rms, and is 4.0 times now; 6 bits lose 0.10% of its energy instead of 20.00%" in text


@pytest.mark.parametrize(
    "name, words",
    [("down_proj", "end of 3 linears"), ("layers.1.mlp.dwn_proj", "did you mean 'layers.1.mlp"), ("x", "first")],
)
def test_other_names_are_answered(plan: Plan, name: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        explain(build_report(plan), name)


@pytest.mark.parametrize("words, remedy", [*REMEDIES, *REFUSALS])
def test_every_remedy_is_reached(plan: Plan, words: str, remedy: str) -> None:
    alone = (words, remedy) in REFUSALS
    reason = f"x is {words} here" if alone else f"pinned by node_1: {words}"
    linear = dataclasses.replace(plan.linears[0], decision="alone" if alone else "online", reason=reason)
    found = dataclasses.replace(plan, linears=(linear, *plan.linears[1:]))
    assert remedy in explain(build_report(found), linear.name)

"""The report: nothing is lost, repeated blocks collapse only where they are alike, JSON carries its schema."""

import dataclasses
import html
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.cost.model import GroupShape, ModelShape
from bwla_compiler.errors import CheckpointError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.collapse import collapse_bases, collapse_norms, mask, ranges, span
from bwla_compiler.inspector.cost import cost_report
from bwla_compiler.inspector.formats import Format
from bwla_compiler.inspector.report import SCHEMA, InspectorReport, build_report
from bwla_compiler.numerics.spread import Spread, Tails, WeightSpread
from bwla_compiler.spec import LinearSpec

Quantized = Callable[[dict[str, float]], Any]


def test_every_linear_is_listed_with_its_decision_and_reason(plan: Plan) -> None:
    report = build_report(plan, source="tiny")
    assert [(x.name, x.decision, x.reason) for x in report.linears] == [
        (x.name, x.decision, x.reason) for x in plan.linears
    ]
    assert report.counts == {"folded": 10, "partial": 3, "online": 2, "alone": 1}
    assert not report.measured
    assert report.bits is None


def test_blocks_collapse_where_they_are_alike(plan: Plan) -> None:
    blocks = build_report(plan).blocks
    assert [(b.label, len(b.names)) for b in blocks] == [("model.layers.{0-1}", 2), ("model.layers.2", 1), ("", 1)]
    assert [x.short for x in blocks[0].linears] == ["k_proj", "v_proj", "o_proj", "mlp.up_proj", "mlp.down_proj"]
    assert sum(len(b.names) * len(b.linears) for b in blocks) == len(plan.linears)


def test_a_different_shape_keeps_blocks_apart(plan: Plan) -> None:
    linears = tuple(
        dataclasses.replace(x, out_features=5) if x.name == "model.layers.1.k_proj" else x for x in plan.linears
    )
    labels = [b.label for b in build_report(dataclasses.replace(plan, linears=linears)).blocks]
    assert labels == ["model.layers.0", "model.layers.1", "model.layers.2", ""]


def test_bases_and_norms_collapse(plan: Plan) -> None:
    assert [(name, n) for name, n, _ in collapse_bases(plan.bases)] == [
        ("residual", 1),
        ("model.layers.{0-2}.v_proj", 3),
    ]
    assert [(name, n) for name, n, _ in collapse_norms(plan.norms)] == [
        ("model.layers.{0-2}.norm.weight", 3),
        ("model.layers.0.q_norm.weight", 1),
    ]


def test_what_was_measured_is_joined_by_name(plan: Plan, quantized: Quantized) -> None:
    report = build_report(plan, recipe="bwla-w1a6", outcome=quantized({"model.layers.1.k_proj": 0.7}))
    errors = {x.name: x.output_error for x in report.linears}
    assert errors.pop("model.layers.1.k_proj") == 0.7
    assert set(errors.values()) == {None}
    assert report.measured
    assert report.bits is not None
    assert report.bits.n_bytes == 2048
    assert [(p.name, p.n_changed, p.skipped) for p in report.passes] == [
        ("fold-norms", 1, (("q_norm", "read by a transpose"),))
    ]


def test_json_has_a_schema_and_loses_nothing(plan: Plan, quantized: Quantized) -> None:
    report = build_report(plan, source="tiny", outcome=quantized({"lm_head": 0.1}))
    data = json.loads(report.to_json())
    assert data.pop("schema") == SCHEMA
    assert data.pop("counts") == report.counts
    blocks = data.pop("blocks")
    assert [b["label"] for b in blocks] == ["model.layers.{0-1}", "model.layers.2", ""]
    assert blocks[2]["linears"] == ["lm_head"]
    assert data == json.loads(json.dumps(dataclasses.asdict(report)))
    assert {f.name for f in dataclasses.fields(report)} == set(data)


def whole(plan: Plan, quantized: Quantized) -> InspectorReport:
    """Return a report in which everything is there that can be."""
    outcome = quantized({"model.layers.0.k_proj": 0.1})
    seen = WeightSpread((1, 2, 3), 0.4)
    spread = Spread(seen, seen, Tails(3.0, 4.0, 6, 0.01, 0.1, (1.0, 2.0)), None)
    linears = tuple(dataclasses.replace(x, spread=spread) for x in outcome.linears)
    formats = {"lm_head": Format(1, "row", 4, 6, 1.25, "kronecker 2 x 4", "why")}
    cost = cost_report(ModelShape((GroupShape("lm_head", LinearSpec(8, (16,))),)), chosen="a100-sxm")
    return build_report(plan, outcome=dataclasses.replace(outcome, linears=linears), formats=formats, cost=cost)


def test_json_is_read_back_as_it_was(plan: Plan, quantized: Quantized) -> None:
    report = whole(plan, quantized)
    assert InspectorReport.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    "text, words",
    [
        ("{}", "version None"),
        ("[", "damaged"),
        ('{"schema": "bwla-inspector/1"}', "reads 'bwla-inspector/3'"),
        (f'{{"schema": "{SCHEMA}", "model": 3}}', "keys missing"),
    ],
)
def test_damaged_json_is_refused(text: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        InspectorReport.from_json(text)


def test_a_notebook_gets_the_page_in_a_frame(plan: Plan) -> None:
    shown = build_report(plan)._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert html.unescape(shown).count("<!doctype html>") == 1
    assert "<!doctype" not in shown


def test_chains_are_those_of_the_plan(plan: Plan) -> None:
    assert build_report(plan).chains[:2] == (("residual",), ("model.layers.0.v_proj",))


def test_mask_hides_what_blocks_differ_in() -> None:
    assert mask("pinned by silu: x") == mask("pinned by silu_12: x")
    assert mask("pinned by silu_1: x") != mask("pinned by gelu_1: x")


def test_span_names_many_by_one() -> None:
    assert span(["a.0.b", "a.1.b", "a.4.b"]) == "a.{0-1,4}.b"
    assert span(["a.0.b"]) == "a.0.b"
    assert span(["a.0.b.0", "a.1.b.1"]) == "a.0.b.0 and 1 more"
    assert span(["a.0", "c.0", "c.0.1"]) == "a.0 and 2 more"


@given(st.sets(st.integers(0, 40), min_size=1))
@settings(deadline=None, max_examples=60)
def test_ranges_hold_exactly_the_numbers(numbers: set[int]) -> None:
    found: list[int] = []
    for part in ranges(sorted(numbers)).split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    assert found == sorted(numbers)

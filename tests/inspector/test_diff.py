"""What differs between two reports: nothing between equals, and each change once for all blocks that have it."""

import dataclasses
import io
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console

from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.diff import SCHEMA, compare_reports, difference_tables
from bwla_compiler.inspector.formats import Format
from bwla_compiler.inspector.report import build_report
from bwla_compiler.inspector.terminal import render_table

PLAIN = Format(1, "row", 0, 6, 1.0)
TURNED = Format(1, "row", 4, 6, 1.25, "kronecker 3 x 4")


def test_equal_reports_have_no_difference(plan: Plan) -> None:
    report = build_report(plan)
    found = compare_reports(report, report, names=("a", "b"))
    assert found.linears == ()
    assert found.equal_linears == len(plan.linears)
    assert all(c.a == c.b for c in found.totals)


def test_changes_of_alike_blocks_are_one(plan: Plan) -> None:
    down = [x.name for x in plan.linears if x.name.endswith("down_proj")]
    a = build_report(plan, formats=dict.fromkeys(down, PLAIN))
    b = build_report(plan, formats=dict.fromkeys(down, TURNED))
    found = compare_reports(a, b, names=("rtn", "bwla"), recipes=({"psp": {"rank": 0}}, {"psp": {"rank": 4}}))
    (change,) = found.linears
    assert change.label == "model.layers.{0-2}.mlp.down_proj"
    assert {c.what: (c.a, c.b) for c in change.changes} == {
        "at run time": ("-", "kronecker 3 x 4"), "rank": (0, 4), "bits": (1.0, 1.25),
    }  # fmt: skip
    assert [(c.what, c.a, c.b) for c in found.settings] == [("psp.rank", "0", "4")]
    out = io.StringIO()
    for table in difference_tables(found):
        Console(file=out, width=80).print(render_table(table))
    assert "kronecker 3 x 4" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_measured_fields_are_means_over_the_blocks(plan: Plan, quantized: Callable[[dict[str, float]], Any]) -> None:
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    a = build_report(plan, outcome=quantized(dict.fromkeys(names, 0.1)))
    b = build_report(plan, outcome=quantized(dict(zip(names, (0.2, 0.4), strict=True))))
    (change,) = compare_reports(a, b, names=("a", "b")).linears
    (error,) = change.changes
    assert (error.what, error.a, round(float(error.b or 0), 9)) == ("error", 0.1, 0.3)


def test_a_linear_that_one_side_lacks_is_said(plan: Plan) -> None:
    less = dataclasses.replace(plan, linears=plan.linears[:-1])
    (change,) = compare_reports(build_report(plan), build_report(less), names=("a", "b")).linears
    assert (change.label, change.changes[0].what, change.changes[0].b) == ("lm_head", "only in one", "")


def test_json_has_a_schema(plan: Plan) -> None:
    report = build_report(plan)
    data = json.loads(compare_reports(report, report, names=("a", "b")).to_json())
    assert data["schema"] == SCHEMA
    assert data["equal_linears"] == len(plan.linears)

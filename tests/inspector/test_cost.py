"""The report on modelled costs: everything is there, and everything says that it is modelled."""

import io
import json

import pytest
from rich.console import Console

from bwla_compiler.cost.devices import DEVICES
from bwla_compiler.cost.model import AttentionShape, GroupShape, ModelShape, TableShape
from bwla_compiler.cost.roofline import region_cost
from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.cost import CostReport, cost_report, crossover_table, device_table, region_table
from bwla_compiler.inspector.report import build_report
from bwla_compiler.inspector.sections import report_page
from bwla_compiler.inspector.terminal import print_report
from bwla_compiler.spec import INT8_ROWS, LinearSpec, TransformSpec

DOWN = LinearSpec(4096, (1024,), transform=TransformSpec("hadamard", 128, 32, False, True))
SHAPE = ModelShape(
    (GroupShape("q_proj, k_proj", LinearSpec(1024, (1024, 512)), 2), GroupShape("down_proj", DOWN, 2)),
    (TableShape("head", 5000, 1024, INT8_ROWS, looked_up=False),),
    attention=(AttentionShape(2, 8, 8, 128),),
    unknown="1 layers of mamba",
)


@pytest.fixture(scope="module")
def cost() -> CostReport:
    return cost_report(SHAPE, recipe="bwla-w1a6", context=4000)


def texts(cells: tuple[object, ...]) -> list[str]:
    return [cell.text for cell in cells]  # type: ignore[attr-defined]


def test_every_table_says_that_it_is_modelled(cost: CostReport) -> None:
    for table in (device_table(cost), crossover_table(cost), region_table(cost)):
        assert "modelled" in table.title
        assert table.note.startswith("Modelled, not measured")


def test_crossovers_are_by_linear_and_device(cost: CostReport) -> None:
    table = crossover_table(cost)
    assert [c.lstrip(">") for c in table.columns[1:]] == list(DEVICES)
    assert [row[0].text for row in table.rows] == [
        "q_proj, k_proj x 2", "down_proj x 2", "all without attention", "whole model",
    ]  # fmt: skip
    expected = region_cost(DOWN, tokens=1, device=DEVICES["h100-sxm"]).crossover
    assert expected is not None
    assert texts(table.rows[1])[1] == f"{expected:.3g}"
    assert texts(table.rows[3])[1] == "never"  # 8 heads with keys of their own: the cache is all


def test_a_narrow_terminal_gets_one_device(cost: CostReport) -> None:
    table = crossover_table(cost, only="a100-sxm")
    assert table.columns == ("M*", ">a100-sxm")
    assert [texts(row)[1] for row in table.rows] == [texts(row)[4] for row in crossover_table(cost).rows]


def test_devices_have_sources_and_what_is_left_out_is_said(cost: CostReport) -> None:
    table = device_table(cost)
    assert [row[-1].text for row in table.rows] == [device.source for device in DEVICES.values()]
    assert "1 layers of mamba" in table.note
    assert "4,000 tokens" in table.note
    assert cost.n_bytes == SHAPE.stored


def test_block_factors_show_what_is_left_as_it_is(cost: CostReport) -> None:
    assert [group.transform for group in cost.groups] == ["", "hadamard 1[128] x 32"]


@pytest.mark.parametrize("width", [80, 160])
def test_terminal_and_page_show_it(cost: CostReport, plan: Plan, width: int) -> None:
    report = build_report(plan, cost=cost)
    out = io.StringIO()
    print_report(report, Console(file=out, width=width))
    assert max(map(len, out.getvalue().splitlines())) <= width
    if width > 80:
        assert "M*, modelled" in out.getvalue()
    page = report_page(report)
    for title in ("Decoding by bwla-w1a6: modelled", "Where decoding becomes compute bound", "One decoded token"):
        assert title in page
    text = out.getvalue()
    assert "A step on h100-sxm: modelled" in text
    assert ("kernels" in text) == (width > 120)
    data = json.loads(report.to_json())["cost"]
    assert data["devices"][0]["crossover"] is None
    assert data["groups"][0]["crossovers"].keys() == DEVICES.keys()

"""The pages: well-formed, self-contained, escaped, every link leads somewhere; the demo's tables and Markdown."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bwla_compiler.cost.devices import DEVICES
from bwla_compiler.cost.model import GroupShape, ModelShape
from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.cost import cost_report
from bwla_compiler.inspector.diagram import block_graph, branches, layout, palette
from bwla_compiler.inspector.page import Section, render_page
from bwla_compiler.inspector.report import build_report
from bwla_compiler.inspector.results import quality_table, result_markdown, result_page
from bwla_compiler.inspector.sections import report_page
from bwla_compiler.numerics.spread import Spread, Tails, WeightSpread
from bwla_compiler.spec import LinearSpec

VOID = {"meta", "link", "rect", "path", "line", "circle", "br", "input", "wbr"}


class Checker(HTMLParser):
    """Follow the tags of a page: those left open, ids, links, and addresses that it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        elif "href" in values or "src" in values:
            self.loads.append(values.get("href") or values["src"])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, tag
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


RESULT: dict[str, Any] = {
    "models": {
        "demo:": {
            "fp": {"perplexity": 20.0, "n_bytes": 4096},
            "recipes": {
                "rtn": {"true_bits": 1.05, "n_bytes": 1024, "a16": 30.0, "a8": 31.0, "a6": 40.0, "a4": 50.0},
                "bwla": {"true_bits": 1.25, "n_bytes": 1030, "a16": 21.0, "a8": 21.5, "a6": 22.0, "a4": 25.0},
            },
        }
    },
    "speed": {"eager fp32": 100.0, "bwla": 250.0, "device": "a <machine>"},
}


def check(page: str) -> Checker:
    """Return the page's checker after what holds for every page."""
    found = Checker(page)
    assert not found.open
    assert len(set(found.ids)) == len(found.ids)
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids), "a link leads nowhere"
    assert found.loads == ["data:,"], "a page loads nothing"
    assert "http" not in page
    return found


def test_report_page_is_whole(plan: Plan) -> None:
    page = report_page(build_report(plan, source="tiny"))
    found = check(page)
    assert {f"linear-{x.name}" for x in plan.linears} <= set(found.ids)
    assert "all &lt;writers&gt; rotate" in page
    assert "<writers>" not in page


def test_report_page_with_measurements_draws_the_heat(plan: Plan, quantized: Callable[[dict[str, float]], Any]) -> None:
    outcome = quantized({x.name: 0.05 * i for i, x in enumerate(plan.linears) if x.block})
    page = report_page(build_report(plan, outcome=outcome))
    check(page)
    assert page.count('tabindex="-1"') == 15
    assert "--e:70%" in page
    assert 'value="e" checked' in page
    assert "read by a transpose" in page


def test_a_model_without_blocks_has_a_page(plan: Plan) -> None:
    alone = Plan("Bare", plan.bases[:1], plan.linears[-1:], (), (), ())
    check(report_page(build_report(alone)))


def test_titles_are_escaped() -> None:
    page = render_page("<b>", [Section("k", "a & b", "<p>body</p>", "c < d")], facts=(("<1", "x"),))
    check(page)
    assert "&lt;b&gt;" in page
    assert "a &amp; b" in page
    assert "c &lt; d" in page


def test_demo_page_and_markdown(plan: Plan) -> None:
    page = result_page(RESULT, build_report(plan))
    check(page)
    assert "<small>1.100x</small>" in page  # beside each perplexity, how many times that of fp
    assert "a &lt;machine&gt;" in page
    text = result_markdown(RESULT)
    assert "| bwla | **21.00** | **21.50** | **22.00** | **25.00** | 1.25 | 1.0 KiB |" in text
    assert "| rtn | 30.00 |" in text
    assert "| bwla | **250.0** |" in text


def test_missing_columns_are_dashes_and_never_best() -> None:
    model = {"fp": {"perplexity": 2.0}, "recipes": {"x": {"true_bits": 1.0, "a6": 3.0}}}
    cells = quality_table("m", model).rows[1]
    assert [c.text for c in cells] == ["x", "-", "-", "3.00", "-", "1.00", "-"]
    assert [c.role for c in cells[1:5]] == ["", "", "best", ""]


def test_branches_run_from_the_residual_stream_back_to_it(plan: Plan) -> None:
    block = build_report(plan).blocks[0]
    names = [[[x.short for x in group] for group in run] for run in branches(block)]
    assert names == [[["k_proj", "v_proj"], ["o_proj"]], [["mlp.up_proj"], ["mlp.down_proj"]]]


def test_nothing_overlaps_in_the_picture(plan: Plan) -> None:
    block = build_report(plan).blocks[0]
    graphs = block_graph(block, plan.norms)
    at, width, height = layout(graphs)
    assert {n for graph in graphs for n in graph} == set(at)
    assert len(set(at.values())) == len(at)
    assert all(0 < x < width and 0 < y < height for x, y in at.values())
    for graph in graphs:
        assert all(at[a][1] < at[b][1] for a, b in graph.edges)


def test_colours_follow_the_bases(plan: Plan) -> None:
    report = build_report(plan)
    colours = palette(report.blocks[0], report.chains)
    assert colours.of(("residual",)) == "residual"
    assert colours.of(()) == "pinned"
    assert colours.of(("model.layers.0.v_proj",)).startswith("basis-")
    assert colours.data(("residual", "model.layers.0.v_proj")) == ' data-chain="c0 c1"'


def test_what_lives_in_a_chain_can_be_lit_up(plan: Plan) -> None:
    page = report_page(build_report(plan))
    buttons = set(re.findall(r'data-light="(c\d+)"', page))
    marked = {name for found in re.findall(r'data-chain="([c\d ]+)"', page) for name in found.split()}
    assert buttons == marked
    assert "written by model.embed; read by lm_head" in page


def test_the_story_of_every_linear_travels_along(plan: Plan) -> None:
    page = report_page(build_report(plan))
    found = re.search(r'<script type="application/json" id="cards">(.*?)</script>', page)
    assert found is not None
    cards = json.loads(found[1])
    assert list(cards) == [x.name for x in plan.linears]
    assert "pinned by the operation silu_1" in cards["model.layers.1.mlp.down_proj"]
    for card in cards.values():
        assert not Checker(card).open


def test_spreads_and_costs_are_drawn(plan: Plan, quantized: Callable[[dict[str, float]], Any]) -> None:
    outcome = quantized({"model.layers.0.k_proj": 0.1})
    seen, tails = WeightSpread((1, 4, 1), 0.4), Tails(9.0, 20.0, 6, 0.01, 0.1, (1.0, 50.0))
    spread = Spread(seen, dataclasses.replace(seen, bimodality=0.6), tails, tails)
    outcome = dataclasses.replace(outcome, linears=(dataclasses.replace(outcome.linears[0], spread=spread),))
    shape = ModelShape((GroupShape("k_proj, v_proj", LinearSpec(8, (4, 4)), 3),))
    page = report_page(build_report(plan, outcome=outcome, cost=cost_report(shape, chosen="a100-sxm")))
    check(page)
    found = re.search(r'id="cards">(.*?)</script>', page)
    assert found is not None
    assert "bimodality 0.400 → 0.600" in json.loads(found[1])["model.layers.0.k_proj"]
    assert page.count('class="panel"') == len(DEVICES)
    assert page.count(" hidden>") == len(DEVICES) - 1
    assert 'data-device="a100-sxm">' in page


def test_a_page_of_64_layers_stays_small(plan: Plan) -> None:
    linears = tuple(
        dataclasses.replace(x, name=x.name.replace("layers.1", f"layers.{i}"), block=f"model.layers.{i}")
        for i in range(64)
        for x in plan.linears[5:10]
    )
    page = report_page(build_report(dataclasses.replace(plan, linears=linears, groups=(), norms=(), axes=())))
    assert len(page) * 3 < 3e6  # cards with pictures are about three times as large


BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)

PROBE = """<script>
const seen = [];
addEventListener("error", (event) => seen.push("error: " + event.message));
addEventListener("load", () => {
  seen.push(document.documentElement.scrollWidth <= innerWidth ? "fits" : "wide");
  const button = document.querySelector('[data-light="c0"]');
  if (button) {
    button.click();
    seen.push("pressed " + button.getAttribute("aria-pressed"), "lit " + document.querySelectorAll(".lit").length);
    document.querySelector('.map a[data-linear="model.layers.1.mlp.down_proj"]').click();
    seen.push("told " + document.querySelector("#card h3").textContent);
    const before = document.querySelector(".flow").getAttribute("viewBox");
    document.querySelector('[data-zoom="in"]').click();
    seen.push("zoomed " + (document.querySelector(".flow").getAttribute("viewBox") !== before));
    const cell = document.querySelector('.map a[tabindex="0"]');
    cell.focus();
    cell.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    seen.push("moved " + (document.activeElement !== cell && document.activeElement.matches(".map a")));
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
    seen.push("lighting " + document.querySelectorAll(".lighting").length);
  }
  document.title = seen.join("; ");
});
</script>"""
"""Put into a page's head: clicks through it and says in the title what happened, errors too."""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
@pytest.mark.parametrize("width", [1280, 375])
def test_a_browser_draws_it_and_answers_clicks(plan: Plan, tmp_path: Path, width: int) -> None:
    page = result_page(RESULT, build_report(plan))
    (tmp_path / "page.html").write_text(page.replace("<head>", f"<head>{PROBE}", 1))
    frame = f'<!doctype html><iframe style="width:{width}px;height:900px;border:0" src="page.html"></iframe>'
    after = "<script>onload = () => setTimeout(() => document.body.append(frames[0].document.title), 50)</script>"
    (tmp_path / "frame.html").write_text(frame + after)
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"]
    command.append((tmp_path / "frame.html").as_uri())
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env={**os.environ})
    said = done.stdout[done.stdout.rfind("</iframe>") :]
    assert "error:" not in said
    assert "fits; pressed true; lit " in said, said[-500:] + done.stderr[-500:]
    assert "lit 0" not in said
    assert "told Omodel.layers.1.mlp.down_proj; zoomed true; moved true; lighting 0" in said

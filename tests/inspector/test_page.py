"""The pages: well-formed, self-contained, escaped, every link leads somewhere; the demo's tables and Markdown."""

import os
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.diagram import block_graph, branches, layout, palette
from bwla_compiler.inspector.page import Section, render_page
from bwla_compiler.inspector.report import build_report
from bwla_compiler.inspector.results import quality_table, result_markdown, result_page
from bwla_compiler.inspector.sections import report_page

VOID = {"meta", "link", "rect", "path", "line", "circle", "br"}


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
    assert page.count('class="heat"') == 15
    assert "--level:70%" in page
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
    assert "1.100x" in page
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
    colours = palette(build_report(plan).blocks[0])
    assert colours.of("residual") == "residual"
    assert colours.of("1[12]") == "pinned"
    assert colours.of("(1[2] x model.layers.0.v_proj)").startswith("basis-")


BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
@pytest.mark.parametrize("width", [1280, 375])
def test_a_browser_draws_it_without_sideways_scrolling(plan: Plan, tmp_path: Path, width: int) -> None:
    page = result_page(RESULT, build_report(plan))
    probe = "<script>document.title = document.documentElement.scrollWidth <= innerWidth ? 'fits' : 'wide'</script>"
    frame = f'<!doctype html><iframe style="width:{width}px;height:900px;border:0" src="page.html"></iframe>'
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{probe}</body>"))
    (tmp_path / "frame.html").write_text(
        frame + "<script>onload = () => document.body.append(frames[0].document.title)</script>"
    )
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env={**os.environ})
    assert "fits" in done.stdout, done.stdout[-500:] + done.stderr[-500:]

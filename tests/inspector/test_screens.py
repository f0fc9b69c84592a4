"""The pages as a browser draws them, kept as pictures in build/screenshots: wide, narrow, light, dark, printed."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from bwla_compiler.cost.model import AttentionShape, GroupShape, ModelShape, TableShape
from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.cost import cost_report
from bwla_compiler.inspector.formats import Format
from bwla_compiler.inspector.report import InspectorReport, build_report
from bwla_compiler.inspector.results import result_page
from bwla_compiler.inspector.sections import report_page
from bwla_compiler.numerics.spread import Spread, Tails, WeightSpread
from bwla_compiler.spec import INT8_ROWS, LinearSpec, TransformSpec
from tests.inspector.conftest import Counted, Measured, Outcome
from tests.inspector.test_page import BROWSER, RESULT

SCREENS = Path(__file__).parents[2] / "build" / "screenshots"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")]


def measured(plan: Plan) -> InspectorReport:
    """Return a report in which every part of the page has something to draw."""
    bell = (0, 1, 3, 9, 16, 22, 22, 16, 9, 3, 1, 0)
    two = (0, 2, 9, 20, 12, 5, 5, 12, 20, 9, 2, 0)
    before = Tails(60.0, 18.0, 6, 0.12, 0.7, (2.0, 3.0, 90.0, 2.5, 4.0))
    after = dataclasses.replace(before, peak=3.5, lost=0.002, zeroed=0.04, channels=(3.0, 3.4, 3.2, 3.1, 3.5))
    spread = Spread(WeightSpread(bell, 0.34), WeightSpread(two, 0.52), before, after)
    rows = [Measured(x.name, 1.2 + 0.01 * i, 0.4, 0.02 * i, spread=spread) for i, x in enumerate(plan.linears)]
    down = LinearSpec(12, (8,), transform=TransformSpec("kronecker", 3, 4, True, True))
    shape = ModelShape(
        (GroupShape("k_proj, v_proj", LinearSpec(8, (4, 4)), 3), GroupShape("down_proj", down, 3)),
        (TableShape("head", 500, 8, INT8_ROWS, looked_up=False),),
        attention=(AttentionShape(3, 2, 2, 4),),
    )
    formats = {x.name: Format(1, "row", 4, 6, 1.25, "scaling, kronecker 3 x 4") for x in plan.linears}
    outcome = Outcome(tuple(rows), bits=Counted())
    return build_report(plan, source="tiny", outcome=outcome, formats=formats, cost=cost_report(shape))


def deep(plan: Plan) -> InspectorReport:
    """Return a report on 64 blocks."""
    linears = tuple(
        dataclasses.replace(x, name=x.name.replace("layers.1", f"layers.{i}"), block=f"model.layers.{i}")
        for i in range(64)
        for x in plan.linears[5:10]
    )
    return build_report(dataclasses.replace(plan, linears=linears, groups=(), norms=(), axes=()), source="deep")


def browse(page: Path, folder: Path, *options: str) -> None:
    """Have the browser open a page and do what its options say."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=2000", *options, page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=90, check=True)


def shot(page: str, path: Path, folder: Path, *, width: int, dark: bool, height: int = 3000) -> bytes:
    """Return the picture of a page in a frame of a width, written to a path; a browser's window has a least width."""
    (folder / "page.html").write_text(page)
    frame = f'<iframe style="width:{width}px;height:{height}px;border:0" src="page.html"></iframe>'
    (folder / "frame.html").write_text(f'<!doctype html><body style="margin:0">{frame}')
    path.parent.mkdir(parents=True, exist_ok=True)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size = f"--window-size={max(width, 500)},{height}"
    browse(folder / "frame.html", folder, scheme, size, "--hide-scrollbars", f"--screenshot={path}")
    return path.read_bytes()


@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_is_drawn_in_light_and_dark(plan: Plan, tmp_path: Path, width: int) -> None:
    page = result_page(RESULT, measured(plan))
    pictures = [
        shot(page, SCREENS / f"results-{width}-{'dark' if dark else 'light'}.png", tmp_path, width=width, dark=dark)
        for dark in (False, True)
    ]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("width", [1280, 375])
def test_a_deep_model_is_drawn(plan: Plan, tmp_path: Path, width: int) -> None:
    picture = shot(report_page(deep(plan)), SCREENS / f"deep-{width}-light.png", tmp_path, width=width, dark=False)
    assert picture.startswith(b"\x89PNG")


def test_it_prints(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(report_page(measured(plan)))
    SCREENS.mkdir(parents=True, exist_ok=True)
    out = SCREENS / "printed.pdf"
    browse(tmp_path / "page.html", tmp_path, f"--print-to-pdf={out}", "--no-pdf-header-footer")
    assert out.read_bytes().startswith(b"%PDF")


def test_pictures_are_left_out_of_git() -> None:
    git = shutil.which("git")
    if git is None or not (SCREENS.parents[1] / ".git").exists():
        pytest.skip("not a clone")
    done = subprocess.run([git, "check-ignore", str(SCREENS)], cwd=SCREENS.parents[1], check=False)
    assert done.returncode == 0

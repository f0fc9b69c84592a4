"""`bench report`: plots, and the marked blocks of README.md and docs, from files of results alone."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import plots, quality
from benchmarks.blocks import rewrite_file
from benchmarks.record import RESULTS, Row, devices, grouped, latest, read
from benchmarks.tables import SAME_FIT, SAME_TEXT, block_text

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "compile.md")


def report(*, folder: Path = RESULTS, pages: Sequence[Path] = PAGES) -> list[Path]:
    """Draw what can be drawn, rewrite the pages, and return the files that were written or changed.

    Raises ResultsError where a page's marks or a file of results are broken.
    """
    drawn = draw(folder)
    return [*drawn, *(page for page in pages if rewrite_file(page, partial(block_text, folder=folder)))]


def draw(folder: Path) -> list[Path]:
    """Draw the files of results in a folder; none where matplotlib is not installed."""
    made: list[Path | None] = []
    for path in sorted(folder.glob("quality-*.jsonl")):
        made.append(quality.plot(_fullest(read(path)), path.with_suffix(".svg")))
    kernels = folder / "kernels.jsonl"
    if kernels.is_file():
        rows = next(iter(devices(read(kernels))), [])
        made += [plots.draw_roofline(rows, folder / "roofline.svg"), plots.draw_speed(rows, folder / "speed.svg")]
    return [path for path in made if path is not None]


def _fullest(rows: Sequence[Row]) -> list[Row]:
    """Return the last rows of the text and machine that has the most of them: a Pareto plot is of one text alone."""
    found = [
        text
        for mine in devices(rows)
        for text in grouped(latest(mine, by=(*SAME_TEXT, *SAME_FIT)), by=SAME_TEXT).values()
    ]
    return max(found, key=lambda mine: (len(mine), max(row["when"] for row in mine)), default=[])

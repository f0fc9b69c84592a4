"""The terminal's text: all decisions and reasons are there, in 80 columns, without colours in a pipe."""

import io

import pytest
from rich.console import Console

from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.progress import ProgressBars
from bwla_compiler.inspector.report import build_report
from bwla_compiler.inspector.table import Table, duration, fixed, number, row, size
from bwla_compiler.inspector.terminal import print_report, render_table

TREE = """\
model.layers.{0-1}  x 2
├── F k_proj         8 -> 4  residual
│   └── all writers rotate
├── F v_proj         8 -> 4  residual
├── P o_proj         8 -> 8  (1[2] x model.layers.0.v_proj)
│   └── the factor of 2 is pinned
├── F mlp.up_proj    8 -> 12  residual
└── O mlp.down_proj  12 -> 8  1[12]
    └── pinned by silu_0: acts on each channel by itself
"""


def text_of(plan: Plan, width: int) -> str:
    """Return what is printed at a width, into a pipe."""
    out = io.StringIO()
    print_report(build_report(plan, source="tiny", recipe="rtn"), Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_the_text_fits_and_has_no_colour_codes(plan: Plan, width: int) -> None:
    text = text_of(plan, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text


def test_the_tree_of_alike_blocks_is_golden(plan: Plan) -> None:
    assert TREE in "\n".join(line.rstrip() for line in text_of(plan, 80).splitlines()) + "\n"


def test_everything_is_said(plan: Plan) -> None:
    text = text_of(plan, 200)
    for part in (
        "TinyForCausalLM  tiny  recipe rtn",
        "16 linears in 3 blocks: 10 folded, 3 partial, 2 online, 1 alone",
        "weight is not floating",
        "lm_head",
        "layers.{0-2}.v_proj ",
        "absorbed by 2 linears",
        "stays: mul_3: also read by transpose_1",
        "aten.erfinv.default",
        "tied: lm_head reads model.embed.weight",
    ):
        assert part in text, part


def test_square_brackets_are_text_and_not_markup() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(render_table(Table("t", ("a",), (row("[bold]x[/bold] 1[4]"),))))
    assert "[bold]x[/bold] 1[4]" in out.getvalue()


def test_progress_in_a_pipe_is_one_line_a_step() -> None:
    out = io.StringIO()
    with ProgressBars(Console(file=out, width=80)) as progress:
        for label in ("train", "fit"):
            for done in range(4):
                progress(label, done, 3)
    assert out.getvalue().splitlines() == ["train (3)", "fit (3)"]


def test_numbers_as_people_read_them() -> None:
    assert [number(x) for x in (None, 3, 12345, 0.12345, 1234.5)] == ["-", "3", "12,345", "0.123", "1,234"]
    assert [fixed(x) for x in (None, 3.14159, 1913.4)] == ["-", "3.14", "1,913"]
    assert [size(x) for x in (12, 2048, 5 * 2**20, 3 * 2**30)] == ["12 B", "2.0 KiB", "5.0 MiB", "3.00 GiB"]
    assert [duration(x) for x in (0.25, 2.5, 125)] == ["250 ms", "2.5 s", "2 min 05 s"]

"""What the commands share."""

import io
import sys

import pytest
from rich.table import Table

from bwla_compiler.cli_options import PIPE_WIDTH, stdout_console


@pytest.mark.parametrize(("columns", "width"), [(None, PIPE_WIDTH), ("40", 40)])
def test_tables_are_whole_in_a_pipe_unless_columns_are_asked_for(
    columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", written := io.StringIO())
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    table = Table(*(f"column {i}" for i in range(12)))
    table.add_row(*(f"value {i}" for i in range(12)))
    stdout_console().print(table)
    assert stdout_console().width == width
    assert ("value 11" in written.getvalue()) == (width == PIPE_WIDTH)

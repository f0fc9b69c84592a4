"""The command bench: hands over to the harness in benchmarks/, which lies beside the package in a source checkout."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from bwla_compiler.cli_options import examples
from bwla_compiler.errors import HarnessError

HARNESS = "benchmarks.cli"


def add_commands(app: typer.Typer) -> None:
    """Add this file's command to the command line."""
    app.command(
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog=examples(
            "bwla-compile bench kernels --quick",
            "bwla-compile bench models demo:",
            "bwla-compile bench report",
        ),
    )(bench)


def bench(context: typer.Context) -> None:
    """Measure kernels, models, quality and quantizing beside peers; report and compare. Needs the source checkout."""
    run = harness(Path(__file__).parent.parent)
    code = run(context.args)
    if code:
        raise typer.Exit(code)


def harness(root: Path) -> Callable[[list[str]], Any]:
    """Return the harness' main function from the checkout at `root`.

    Raises HarnessError where the package was installed without its repository.
    """
    if not (root / "benchmarks" / "cli.py").is_file():
        raise HarnessError(
            "bench needs the source checkout: its harness, its results and the pages that it writes are no part of the "
            "installed package. Clone the repository, and there: make setup, then .venv/bin/bwla-compile bench"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    found: Callable[[list[str]], Any] = importlib.import_module(HARNESS).main
    return found

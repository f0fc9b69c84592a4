"""What the commands share: their options' types, the console, progress, and files that they write."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bwla_compiler.errors import CheckpointError, RecipeError
from bwla_compiler.inspector.progress import ProgressBars
from bwla_compiler.recipe import Override, Recipe, load_recipe, parse_setting


def examples(*lines: str) -> str:
    """Return the end of a command's help: one example a line."""
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, demo: or demo:outliers.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="A recipe's name, or a .toml file. See: bwla-compile recipes.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field of the recipe; repeatable."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")]


def _in_a_folder(path: Path | None) -> Path | None:
    """Return the path of a file to be written. Raises CheckpointError, before anything is done, where it cannot be."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise CheckpointError(f"{path}: cannot be written: give a file in a folder that exists")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the result as JSON.", callback=_in_a_folder),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
OutFolder = Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the result goes.")]
Page = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Also write the inspector's page.", callback=_in_a_folder),
]


PIPE_WIDTH = 240
"""Characters of a line where no terminal says how many there are."""


def stdout_console() -> Console:
    """Return the console of results. Into a file or a pipe, which have no width, tables are written whole."""
    console = Console(soft_wrap=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(soft_wrap=False, width=PIPE_WIDTH)


@contextmanager
def progress_bars() -> Iterator[ProgressBars]:
    """Give a progress callback that draws on the error stream."""
    with ProgressBars(Console(stderr=True)) as bars:
        yield bars


def chosen_recipe(
    name: str, changes: Sequence[str] | None, *, keep: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Recipe:
    """Return a recipe with its --set, --keep and --override options. Raises RecipeError."""
    recipe = load_recipe(name, dict(parse_setting(text) for text in changes or []))
    added = [Override(pattern, keep=True) for pattern in keep]
    for text in overrides:
        pattern, colon, setting = text.partition(":")
        if not colon or not pattern:
            raise RecipeError(
                f"override {text!r}: write it as PATTERN:section.field=value, for instance *.o_proj:psp.rank=8"
            )
        added.append(Override(pattern, set=dict([parse_setting(setting)])))
    return replace(recipe, overrides=(*recipe.overrides, *added)) if added else recipe


def write_text(path: Path, text: str) -> None:
    """Write a file. Raises CheckpointError."""
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error

"""Marked blocks of Markdown files, written from results alone.

A block lies between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; what is between is replaced whole.
"""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.errors import ResultsError

MARK = re.compile(r"(<!-- bench:(?P<name>[a-z_]+) -->\n)(?P<text>.*?)(<!-- /bench:(?P=name) -->)", re.DOTALL)
OPENING, CLOSING = re.compile(r"<!-- bench:([a-z_]+) -->"), re.compile(r"<!-- /bench:([a-z_]+) -->")


def rewritten(text: str, made: Callable[[str], str]) -> str:
    """Return a Markdown text with every marked block made anew. made(name) returns a block's Markdown.

    Raises ResultsError for a mark that is not closed, or whose name `made` does not know (a KeyError of it).
    """
    names = OPENING.findall(text)
    if names != CLOSING.findall(text) or len(MARK.findall(text)) != len(names):
        raise ResultsError(f"marks do not match: opened {names}, closed {CLOSING.findall(text)}")

    def replace(found: re.Match[str]) -> str:
        try:
            new = made(found["name"])
        except KeyError as error:
            raise ResultsError(f"no block is called {found['name']!r}") from error
        return f"{found[1]}{new.strip()}\n{found[4]}"

    return MARK.sub(replace, text)


def rewrite_file(path: Path, made: Callable[[str], str]) -> bool:
    """Make the marked blocks of a file anew; return whether that changed it. Raises ResultsError as `rewritten`."""
    before = path.read_text("utf-8")
    try:
        after = rewritten(before, made)
    except ResultsError as error:
        raise ResultsError(f"{path.name}: {error}") from error
    if after != before:
        path.write_text(after, "utf-8")
    return after != before

"""Progress of what a call of torch.compile does: a bar on the error stream of a terminal, silence elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from bwla_compiler.inspector.progress import ProgressBars


@contextmanager
def telling() -> Iterator[ProgressBars | None]:
    """Give a progress callback that draws bars while this is entered, None where nobody would see them."""
    if not sys.stderr.isatty():
        yield None
        return
    with ProgressBars(Console(stderr=True)) as bars:
        yield bars

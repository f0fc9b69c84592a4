"""Progress of long steps: a bar with the time left in a terminal, one line a step elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBars:
    """A callback progress(label, done, total) that draws one bar for each label, while it is entered."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("in"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, label: str, done: int, total: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
            if not self._console.is_terminal:
                self._console.print(f"{label} ({total})", highlight=False, markup=False, soft_wrap=True)
        self._bars.update(self._tasks[label], completed=done, total=total)

    def tell(self, line: str) -> None:
        """Print a line that stays, above the bars."""
        self._bars.console.print(line, highlight=False, markup=False, soft_wrap=True)

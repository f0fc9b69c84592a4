"""What `bench quality --anchors` and `--anchor` print."""

import typer

from benchmarks.record import Row
from bwla_compiler.cli_options import progress_bars, stdout_console
from bwla_compiler.inspector.terminal import render_table


def print_anchors() -> None:
    """List the published figures."""
    from benchmarks.anchors import anchors
    from benchmarks.shown import anchors_table

    console = stdout_console()
    console.print(render_table(anchors_table(anchors(), wide=console.width >= 200)))


def measured_anchor(key: str, *, model: str, data: str, activations: int) -> Row:
    """Return the row of a model measured beside a published figure. Raises BadParameter where no model was named."""
    from benchmarks import anchors, protocol

    wanted = anchors.anchor(key)
    if not model:
        raise typer.BadParameter(f"which model? give --model with a folder of {wanted.hub_id}")
    with progress_bars() as progress:
        return protocol.measure_anchor(wanted, model=model, data=data, activations=activations, progress=progress)


def tell_verdict(row: Row) -> None:
    """Print the verdict of a row; exits with 1 where it is no pass."""
    passed = row["verdict"] == "pass"
    stdout_console().print(f"{row['verdict']}: {row['said']}", style="green" if passed else "red")
    if not passed:
        raise typer.Exit(1)

"""The command that shows what the compiler saw, decided and paid: inspect."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from bwla_compiler.cli_options import examples, progress_bars, stdout_console, write_text
from bwla_compiler.inspector.cost import DEFAULT_DEVICE
from bwla_compiler.inspector.diff import difference_tables
from bwla_compiler.inspector.table import Table, row
from bwla_compiler.inspector.terminal import print_report, render_table
from bwla_compiler.inspector.why import explain


def add_commands(app: typer.Typer) -> None:
    """Add this file's command to the command line."""
    app.command(
        epilog=examples(
            "bwla-compile inspect demo:",
            "bwla-compile inspect DIR -o report.html --on a100-sxm",
            "bwla-compile inspect config.json --json",
            "bwla-compile inspect DIR --why layers.3.mlp.down_proj",
            "bwla-compile inspect DIR --diff rtn bwla-w1a6",
            "bwla-compile inspect --diff PACKED1 PACKED2",
            "bwla-compile inspect OUT --bits",
        )
    )(inspect)


def inspect(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A folder, a config.json, a hub id, or demo:.")] = "",
    html: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write a page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    recipe: Annotated[str, typer.Option("--recipe", help="Inspect what this recipe would do.")] = "",
    why: Annotated[str, typer.Option("--why", metavar="LINEAR", help="Explain one linear in full sentences.")] = "",
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option("--diff", metavar="A B", help="Compare two recipes on MODEL, or without MODEL two models."),
    ] = None,
    by_bits: Annotated[
        bool, typer.Option("--bits", help="Of a packed folder: bytes by kind, claimed, counted and on the disk.")
    ] = False,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence, for the modelled costs.")] = 2048,
    on: Annotated[str, typer.Option("--on", metavar="DEVICE", help="Device of the modelled costs.")] = DEFAULT_DEVICE,
) -> None:
    """Show what the compiler sees and decides: bases, what folds, what is online, and why; and what it would cost.

    A float model's weights are not read: a config.json is enough. A folder that `quantize` wrote shows its errors too.
    """
    if not model and diff is None:
        raise typer.BadParameter("Missing argument 'MODEL' (it may be left out with --diff A B, of two models)")
    if by_bits:
        _print_ledger(model, as_json=as_json)
        return
    from bwla_compiler import inspection

    if diff is not None:
        with progress_bars() as progress:
            found = inspection.compare(model, *diff, context=context, device=on, progress=progress)
        if as_json:
            print(found.to_json())
        else:
            for table in difference_tables(found):
                if table.rows or table.note:
                    stdout_console().print(render_table(table))
                    stdout_console().print()
        return
    with progress_bars() as progress:
        report = inspection.inspect(model, recipe=recipe, context=context, device=on, progress=progress)
    if html:
        from bwla_compiler.inspector.sections import report_page

        write_text(html, report_page(report))
    if why:
        stdout_console().print(explain(report, why), highlight=False, markup=False)
    elif as_json:
        print(report.to_json())
    else:
        print_report(report, stdout_console())


def _print_ledger(source: str, *, as_json: bool) -> None:
    """Print bytes by kind; their last row is the sum, which is that of the files."""
    from bwla_compiler import api

    found = api.ledger(source)
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    rows = [row(e.kind, e.claimed or None, e.counted, e.stored) for e in found.entries]
    sums = (sum(getattr(e, part) for e in found.entries) for part in ("counted", "stored"))
    rows.append(row("all", None, *sums))
    claimed, counted = found.claimed_bits.get("linears", 0.0), found.bits.linears
    note = f"bits a linear weight: {claimed:.4f} by its config, {counted:.4f} counted; files: {found.file_bytes} bytes"
    columns = ("bytes of", ">claimed", ">counted", ">on disk")
    stdout_console().print(render_table(Table(source, columns, tuple(rows), note)))

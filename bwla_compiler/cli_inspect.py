"""The command that shows what the compiler saw, decided and paid: inspect."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bwla_compiler.cli_options import AsJson, examples, progress_bars, stdout_console, write_text
from bwla_compiler.errors import PlanError
from bwla_compiler.inspector.cost import DEFAULT_DEVICE
from bwla_compiler.inspector.diff import difference_tables
from bwla_compiler.inspector.table import Table, row
from bwla_compiler.inspector.terminal import print_report, render_table
from bwla_compiler.inspector.why import explain
from bwla_compiler.recipe import load_recipe
from bwla_compiler.settings import settings


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
            "bwla-compile inspect demo: --dump graphs --verify",
        )
    )(inspect)


def inspect(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A folder, a config.json, a hub id, or demo:.")] = "",
    html: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write a page.")] = None,
    as_json: AsJson = False,
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
    dump: Annotated[
        Path | None,
        typer.Option("--dump", metavar="FOLDER", help="Write graphs after each pass, their diffs, and kernel sources."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute again after each pass, in float64, and name the first that errs.")
    ] = False,
    on: Annotated[str, typer.Option("--on", metavar="DEVICE", help="Device of the modelled costs.")] = DEFAULT_DEVICE,
) -> None:
    """Show what the compiler sees and decides: bases, what folds, what is online, and why; and what it would cost.

    A float model's weights are not read: a config.json is enough. A folder that `quantize` wrote shows its errors too.
    """
    if not model and diff is None:
        raise typer.BadParameter("Missing argument 'MODEL' (it may be left out with --diff A B, of two models)")
    others = {"--recipe": recipe, "--why": why, "--out": html, "--dump": dump, "--verify": verify}
    if by_bits:
        _refuse("--bits", {**others, "--diff": diff})
        _print_ledger(model, as_json=as_json)
        return
    if diff is not None:
        _refuse("--diff", others)
    if why:
        _refuse("--why", {"--json": as_json})
    from bwla_compiler import inspection

    if diff is None and (verify or dump or settings().dump):
        _run_passes(model, recipe or inspection.DEFAULT_RECIPE, folder=dump or settings().dump, verify=verify)
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


def _refuse(option: str, others: Mapping[str, object]) -> None:
    """Raise BadParameter for options that would go unheard beside another."""
    if given := [name for name, value in others.items() if value]:
        raise typer.BadParameter(f"{option} does not go with {', '.join(given)}: run it once more without {option}")


def _run_passes(source: str, recipe: str, *, folder: Path | None, verify: bool) -> None:
    """Run the passes on copies of a float model: write their graphs, check what it computes after each."""
    from bwla_compiler import api
    from bwla_compiler.dumping import dump_passes
    from bwla_compiler.evaluate.stages import check_passes, require_passed
    from bwla_compiler.inspection import packed_config

    console, chosen = Console(stderr=True), load_recipe(recipe)
    with progress_bars() as progress:
        loaded = api.skeleton(source) if source.endswith(".json") else api.load(source, progress=progress)
        if packed_config(loaded.model) is not None:
            raise PlanError(f"{source} is packed: passes run on a float model; give the model that it was made from")
        if verify and any(parameter.is_meta for parameter in loaded.model.parameters()):
            raise PlanError(f"{source} has no weights to compute with: --verify needs a model folder")
        files = dump_passes(loaded.model, folder, chosen, progress=progress) if folder else ()
        stages = check_passes(loaded.model, chosen, progress=progress) if verify else ()
    if files:
        console.print(f"wrote {len(files)} files to {folder}", highlight=False)
    if stages:
        rows = tuple(
            row(s.name, s.n_changed, s.n_skipped, f"{s.error:.1e}", "yes" if s.passed else "NO") for s in stages
        )
        note = f"Relative logit error to the model as it came, float64; allowed {stages[0].tolerance:.0e}."
        columns = ("pass", ">changed", ">left alone", ">error", "same function")
        console.print(render_table(Table("The function after each pass", columns, rows, note)))
    require_passed(stages)


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

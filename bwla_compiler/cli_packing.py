"""The commands that make and use packed models: quantize, eval, generate."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bwla_compiler.cli_options import (
    Device,
    JsonFile,
    Model,
    RecipeName,
    Seed,
    Settings,
    chosen_recipe,
    examples,
    progress_bars,
    stdout_console,
    write_text,
)
from bwla_compiler.errors import CalibrationError, CheckpointError
from bwla_compiler.inspector.table import Table, duration, fixed, row, size
from bwla_compiler.inspector.terminal import print_report, render_table


def add_commands(app: typer.Typer) -> None:
    """Add this file's commands to the command line."""
    app.command(
        epilog=examples(
            "bwla-compile quantize demo: -o small",
            "bwla-compile quantize DIR -o OUT --calibration wiki.txt --set activations.bits=8",
            "bwla-compile quantize DIR -o OUT --keep 'model.layers.0.*' --override '*.down_proj:psp.rank=8'",
        )
    )(quantize)
    app.command(
        "eval", epilog=examples("bwla-compile eval demo:", "bwla-compile eval DIR --text wiki.txt --length 2048")
    )(evaluate)
    app.command(epilog=examples('bwla-compile generate demo: --prompt "Return the" --tokens 32'))(generate)


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the packed model goes.")],
    recipe: RecipeName = "bwla-w1a6",
    changes: Settings = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave linears of this name as they are; repeatable."),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN:FIELD=VALUE", help="Change a field for the linears of this name; repeatable."),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="self (sampled from the model), random, none, or a file of text or token ids.")
    ] = "self",
    spill: Annotated[bool, typer.Option("--spill", help="Keep activations in files beside OUT.")] = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write the inspector's page.")
    ] = None,
) -> None:
    """Quantize a model into a folder, block by block; a killed run goes on when it is repeated.

    Memory: one block, embedding and head, and the activations. Finished blocks wait in FOLDER.partial; FOLDER itself
    appears when it is complete.
    """
    chosen = chosen_recipe(recipe, changes, keep=keep or (), overrides=override or ())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not an empty folder; give another one or remove it")
    from bwla_compiler import api

    with progress_bars() as progress:
        report = api.quantize_to(
            model,
            out,
            recipe=chosen,
            calibration=calibration,
            seed=seed,
            spill=spill,
            progress=progress,
            on_block=lambda block: progress.tell(str(block)),
        )
    if json_file:
        write_text(json_file, report.to_json())
    _print_quantized(report, model, out, html)


def _print_quantized(report: Any, source: str, out: Path, html: Path | None) -> None:
    from bwla_compiler.inspector.report import build_report

    shown = build_report(report.plan, source=source, recipe=report.recipe.name, outcome=report)
    console = stdout_console()
    print_report(shown, console)
    if html:
        from bwla_compiler.inspector.sections import report_page

        write_text(html, report_page(shown))
    for what, why in (pair for done in report.passes if done.name == "tune" for pair in done.skipped):
        Console(stderr=True).print(f"tuning, {what}: {why}", style="yellow", highlight=False)
    console.print(f"wrote {out} in {duration(sum(report.seconds.values()))}", highlight=False)


def evaluate(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            "--data", "--text", metavar="FILE", help="Text or token ids; demo:test and demo:ood are the embedded text."
        ),
    ] = "",
    sequences: Annotated[int, typer.Option(min=1, help="Sequences at most.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 256,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Measure perplexity on a text, and count true bits."""
    from bwla_compiler import api

    source = text or ("demo:test" if model.startswith("demo:") else "")
    if not source:
        raise CalibrationError(f"{model}: which text? give --text FILE, or --text demo:test for the embedded text")
    with progress_bars() as progress:
        loaded = api.load(model, device=device, progress=progress)
        tokens = _tokens(source, loaded.tokenizer, sequences=sequences, length=length)
        found = api.perplexity(loaded.model, tokens, progress=progress)
    bits = api.bits(loaded.model)
    if as_json:
        fields = {"perplexity": found, "n_tokens": tokens.numel(), "bits": bits.linears, "n_bytes": bits.n_bytes}
        print(json.dumps(fields))
        return
    cells = row(model, fixed(found), tokens.numel(), fixed(bits.linears), fixed(bits.model), size(bits.n_bytes))
    columns = ("model", ">perplexity", ">tokens", ">bits, linears", ">bits, model", ">bytes")
    stdout_console().print(render_table(Table("", columns, (cells,), f"text: {source}")))


def _tokens(source: str, tokenizer: Any, *, sequences: int, length: int) -> Any:
    """Return tokens [n, length + 1] int64 of a file, or of a split of the embedded text."""
    if source in ("demo:test", "demo:ood"):
        from bwla_compiler.demo.model import demo_tokens

        return demo_tokens("ood" if source == "demo:ood" else "test", sequences=sequences, length=length)
    from bwla_compiler.tokens import from_file

    return from_file(source, tokenizer, length=length + 1, limit=sequences)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="How the text begins.")] = "The",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 64,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Continue a prompt."""
    from bwla_compiler import api

    with progress_bars() as progress:
        loaded = api.load(model, device=device, progress=progress)
        text = api.generate(loaded.model, loaded.tokenizer, prompt, tokens=tokens, seed=seed)
    print(text)

"""The commands that make and use packed models: quantize, eval, generate, serve, export."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bwla_compiler.cli_options import (
    AsJson,
    Device,
    JsonFile,
    Model,
    OutFolder,
    Page,
    RecipeName,
    Seed,
    Settings,
    chosen_recipe,
    examples,
    progress_bars,
    stdout_console,
    write_text,
)
from bwla_compiler.errors import CalibrationError
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
        "eval",
        epilog=examples(
            "bwla-compile eval demo:",
            "bwla-compile eval OUT --data wiki.txt --context 2048 --stride 512",
            "bwla-compile eval OUT --data wiki.txt --against DIR",
            "bwla-compile eval OUT --tasks piqa,hellaswag,winogrande,arc_easy,arc_challenge",
        ),
    )(evaluate)
    app.command(epilog=examples('bwla-compile generate demo: --prompt "Return the" --tokens 32'))(generate)
    app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog=examples("bwla-compile serve OUT", "bwla-compile serve OUT --host 0.0.0.0 --port 8080"),
    )(serve)
    app.command(
        epilog=examples(
            "bwla-compile export OUT --to dense -o DENSE", "bwla-compile export OUT --to gguf -o model.gguf"
        )
    )(export)


def quantize(
    model: Model,
    out: OutFolder,
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
    html: Page = None,
) -> None:
    """Quantize a model into a folder, block by block; a killed run goes on when it is repeated.

    Memory: one block, embedding and head, and the activations. Finished blocks wait in FOLDER.partial; FOLDER itself
    appears when it is complete.
    """
    chosen = chosen_recipe(recipe, changes, keep=keep or (), overrides=override or ())
    from bwla_compiler import api
    from bwla_compiler.checkpoint.work import check_out

    check_out(out)
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
            beside=lambda report: _stored_report(report, model),
        )
    _print_quantized(report, model, out, html)
    if json_file:
        write_text(json_file, report.to_json())


def _stored_report(report: Any, source: str) -> dict[str, str]:
    """Return what `inspect OUT` shows, without times: a run that was resumed leaves the same bytes."""
    from bwla_compiler.inspection import STORED
    from bwla_compiler.inspector.report import build_report

    timeless = build_report(report.plan, source=source, recipe=report.recipe.name, outcome=report.without_times())
    return {STORED: timeless.to_json()}


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
    length: Annotated[int, typer.Option("--length", "--context", min=2, help="Tokens a sequence or window.")] = 256,
    stride: Annotated[
        int, typer.Option(min=0, help="Tokens from window to window over one stream; 0: sequences side by side.")
    ] = 0,
    against: Annotated[str, typer.Option(metavar="MODEL", help="Also compare with this model, the original.")] = "",
    tasks: Annotated[
        str, typer.Option(metavar="NAMES", help="Also run these tasks of lm-eval: names or .yaml files, by commas.")
    ] = "",
    limit: Annotated[int, typer.Option(min=0, help="Examples of each task; 0 for all.")] = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on a text, and count true bits; against the original, KL, agreement and error by layer."""
    from bwla_compiler import api

    source = text or ("demo:test" if model.startswith("demo:") and not tasks else "")
    if not source and not tasks:
        raise CalibrationError(f"{model}: which text? give --text FILE, or --text demo:test for the embedded text")
    if stride and source.startswith("demo:"):
        raise CalibrationError(f"{source} is no one stream: give --data FILE with --stride")
    if against and not source:
        raise CalibrationError("on which text? give --data FILE with --against")
    fields: dict[str, Any] = {}
    with progress_bars() as progress:
        loaded = api.load(model, device=device, progress=progress)
        if source:
            tokens = _tokens(source, loaded.tokenizer, sequences=sequences, length=length)
            if against:  # first, since it may be refused
                original = api.load(against, device=device, progress=progress)
                fields |= _nearness(original.model, loaded.model, tokens, progress=progress)
            fields |= _on_text(loaded.model, tokens, context=length, stride=stride, progress=progress)
        if tasks:
            fields["tasks"] = api.run_tasks(loaded.model, loaded.tokenizer, tasks.split(","), limit=limit or None)
    bits = api.bits(loaded.model)
    fields |= {"bits": bits.linears, "bits_model": bits.model, "n_bytes": bits.n_bytes}
    if as_json:
        print(json.dumps(fields))
    else:
        _print_evaluated(model, fields, source)


def _on_text(model: Any, tokens: Any, *, context: int, stride: int, progress: Any) -> dict[str, Any]:
    """Return perplexity, and how it was measured."""
    from bwla_compiler import api

    fields: dict[str, Any] = {"context": context, "stride": stride or context}
    if stride:
        found = api.windowed_perplexity(model, tokens.flatten(), context=context, stride=stride, progress=progress)
        return {**fields, "perplexity": found.perplexity, "n_tokens": found.n_tokens}
    return {**fields, "perplexity": api.perplexity(model, tokens, progress=progress), "n_tokens": tokens[:, 1:].numel()}


def _nearness(original: Any, model: Any, tokens: Any, *, progress: Any) -> dict[str, Any]:
    """Return KL, agreement and per-layer errors against the original."""
    from bwla_compiler import api

    layers = api.layer_errors(original, model, tokens, progress=progress)  # refuses what is not alike
    near = api.fidelity(original, model, tokens, progress=progress)
    return {"kl": near.kl, "top1_agreement": near.top1_agreement, "layer_errors": layers}


def _print_evaluated(model: str, fields: dict[str, Any], source: str) -> None:
    bits = (fixed(fields["bits"]), fixed(fields["bits_model"]), size(fields["n_bytes"]))
    cells, columns, note = [model], ["model"], ""
    if source:
        cells += [fixed(fields["perplexity"]), fields["n_tokens"]]
        columns += [">perplexity", ">tokens"]
        note = f"text: {source}; context {fields['context']}, stride {fields['stride']}"
    cells, columns = [*cells, *bits], [*columns, ">bits, linears", ">bits, model", ">bytes"]
    console = stdout_console()
    console.print(render_table(Table("", tuple(columns), (row(*cells),), note)))
    if "kl" in fields:
        near = row(f"{fields['kl']:.4f}", f"{fields['top1_agreement']:.1%}")
        told = "of the next token's chances, against the original's"
        console.print(render_table(Table("", (">KL, nats", ">same best token"), (near,), told)))
        rows = tuple(row(name, f"{error:.4f}") for name, error in fields["layer_errors"].items())
        told = "distance of each block's output from the original's, over the original's norm"
        console.print(render_table(Table("", ("layer", ">error"), rows, told)))
    if "tasks" in fields:
        figures = [(task, name, value) for task, found in fields["tasks"].items() for name, value in found.items()]
        rows = tuple(row(task, name, f"{value:.4f}") for task, name, value in figures)
        console.print(render_table(Table("", ("task", "figure", ">value"), rows)))


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
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0: always the likeliest token.")] = 0.7,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Continue a prompt; the text appears as it is made."""
    from bwla_compiler import api

    with progress_bars() as progress:
        loaded = api.load(model, device=device, progress=progress)
    tell = lambda text: print(text, end="", flush=True)  # noqa: E731
    api.generate(
        loaded.model, loaded.tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed, on_text=tell
    )
    print()


def serve(
    context: typer.Context, model: Annotated[str, typer.Argument(metavar="OUT", help="A folder or a hub id.")]
) -> None:
    """Answer OpenAI's clients on http://localhost:8000/v1: `transformers serve` with its options, on packed models."""
    from bwla_compiler.serving import serve

    serve(model, context.args)


def export(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the exported model goes; for gguf a file too.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="dense: float16 weights that any reader of the family takes; gguf: for llama.cpp, of bwla-folded.",
        ),
    ] = "dense",
) -> None:
    """Write a packed model in a form that other readers take; what the form cannot hold is refused with the reason."""
    from bwla_compiler import api
    from bwla_compiler.checkpoint.work import check_out

    check_out(out)
    with progress_bars() as progress:
        loaded = api.load(model, progress=progress)
    api.export(loaded.model, out, to=to, tokenizer=loaded.tokenizer)
    stdout_console().print(f"wrote {out}", highlight=False)

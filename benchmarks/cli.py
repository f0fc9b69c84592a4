"""The command line of the harness: `bwla-compile bench KIND`, or `python -m benchmarks KIND`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from benchmarks.record import Row
from bwla_compiler.cli_options import JsonFile, Seed, examples, progress_bars, stdout_console, write_text
from bwla_compiler.inspector.terminal import render_table

app = typer.Typer(
    name="bench",
    help="Measure kernels, models, quality and quantizing beside what one would use instead. Results are appended to "
    "benchmarks/results.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog=examples(
        "bwla-compile bench kernels --short",
        "bwla-compile bench models demo:",
        "bwla-compile bench quality --row ours",
        "bwla-compile bench report",
    ),
)

Quick = Annotated[bool, typer.Option("--quick", help="Fewer cases and less text: rougher figures, sooner.")]
Minutes = Annotated[float, typer.Option(min=0, help="Begin nothing that would not fit; 0 for no limit.")]
Subject = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, demo:, demo:outliers, or a config.json.")]
Layers = Annotated[int, typer.Option(min=0, help="Of a config: so many blocks alone.")]
Vocab = Annotated[int, typer.Option(min=0, help="Of a config: so small a vocabulary.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads, held to as many cores.")]

_asked: list[str] = []


def main(arguments: Sequence[str]) -> int:
    """Run a command of the harness and return its exit code; errors of wrong usage are the caller's."""
    _asked[:] = arguments
    code = typer.main.get_command(app).main(list(arguments), "bwla-compile bench", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _kept(kind: str, rows: Sequence[Row], label: str = "") -> None:
    """Show rows and append them to the results."""
    from benchmarks.record import record

    _shown(kind, rows)
    stdout_console().print(f"appended to {record(label or kind, rows, command=_asked)}", highlight=False)


def _shown(kind: str, rows: Sequence[Row]) -> None:
    from benchmarks.shown import rows_table

    stdout_console().print(render_table(rows_table(kind, rows)))


def _budget(minutes: float) -> Any:
    from benchmarks.budget import Budget

    return Budget(60 * minutes) if minutes else Budget()


@app.command(
    epilog=examples(
        "bwla-compile bench kernels --minutes 3",
        "bwla-compile bench kernels --shape '8B gate' --tokens 1 --threads 1 --peer 'ggml Q1_0' --isa avx2",
    )
)
def kernels(
    shape: Annotated[list[str] | None, typer.Option(help="A linear, 'transform of N', 'prologue of LINEAR'.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="So many tokens; repeatable.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="On so many threads; repeatable.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Beside this peer alone; repeatable.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Beside the peers of bench all alone.")] = False,
    isa: Annotated[str, typer.Option(help="Our kernels' instructions: amx, avx512vbmi, avx512, avx2, portable.")] = "",
    minutes: Minutes = 0,
) -> None:
    """Time linears and transforms by shape, tokens and threads, under the machine's ceilings of the same run."""
    from benchmarks import kernels as kind
    from benchmarks.forced_isa import held_to
    from benchmarks.kernel_peers import PEERS, SHORT
    from benchmarks.record import record

    with held_to(isa):
        with progress_bars() as progress:  # a run takes long: each case is written as soon as it is there
            rows = kind.measure(
                progress, shapes=shape or (), tokens=tokens or (), threads=threads or (),
                peers=peer or (SHORT if short else tuple(PEERS)), budget=_budget(minutes),
                keep=partial(record, "kernels", command=_asked),
            )  # fmt: skip
        _shown("kernels", rows)


@app.command(
    epilog=examples(
        "bwla-compile bench models demo:",
        "bwla-compile bench models OUT --floats DIR --way bwla --way 'inductor bf16'",
        "bwla-compile bench models benchmarks/configs/qwen3-0.6b.json --layers 4 --vocab 16384",
    )
)
def models(
    model: Subject = "demo:",
    floats: Annotated[str, typer.Option(metavar="DIR", help="The original of a packed folder, for the peers.")] = "",
    layers: Layers = 0,
    vocab: Vocab = 0,
    alike: Annotated[
        bool, typer.Option("--alike", help="Of a config: all blocks have the same weights, and one is quantized.")
    ] = False,
    way: Annotated[list[str] | None, typer.Option(help="This way, and what it is held against; repeatable.")] = None,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded one by one.")] = 16,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds that are counted.")] = 8,
    threads: Threads = 2,
    warm: Annotated[bool, typer.Option(help="Also start everything again with warm caches.")] = True,
    minutes: Minutes = 0,
) -> None:
    """Time whole models: decode, prefill, first token, memory, compile time cold and warm."""
    from benchmarks import models as kind
    from benchmarks.markdown import peers_line

    work = kind.Work(prompt=prompt, steps=steps, rounds=rounds, threads=threads, warm=warm)
    with progress_bars() as progress:
        rows = kind.measure(
            progress, model=model, floats=floats, layers=layers, vocab=vocab, alike=alike, chosen=way or (), work=work,
            budget=_budget(minutes),
        )  # fmt: skip
    _kept("models", rows)
    stdout_console().print(peers_line(rows), highlight=False)


@app.command(
    epilog=examples(
        "bwla-compile bench quality --row ours --row GPTQ",
        "bwla-compile bench quality --model TRAINED",
        "bwla-compile bench quality --ends",
        "bwla-compile bench quality --anchors",
        "bwla-compile bench quality --anchor bwla/BWLA/A6/Qwen3-32B --model OUT --data wiki.test.raw --activations 6",
    )
)
def quality(
    seed: Annotated[int, typer.Option(help="A fresh model of this seed and split; else the embedded one.")] = -1,
    outliers: Annotated[bool, typer.Option("--outliers", help="The model with heavy-tailed activations.")] = False,
    pca: Annotated[bool, typer.Option("--pca", help="The model in its PCA basis, with its own tails.")] = False,
    row: Annotated[list[str] | None, typer.Option(metavar="WAY", help="This row alone; repeatable.")] = None,
    fair: Annotated[bool, typer.Option("--fair", help="The same help for all, at equal true bits.")] = False,
    ends: Annotated[bool, typer.Option("--ends", help="Embedding and head in 8 and 4 bits.")] = False,
    calibration_seed: Annotated[int, typer.Option(help="Of the calibration's draw; the model's by default.")] = -1,
    sequences: Annotated[int, typer.Option(min=1, help="Of calibration, of 256 tokens.")] = 96,
    model: Annotated[
        str, typer.Option(metavar="DIR", help="A folder of bench train, or any other with --tokens or --anchor.")
    ] = "",
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text of --model, or ids: streams train and test.")
    ] = None,
    anchors: Annotated[bool, typer.Option("--anchors", help="List published figures and stop.")] = False,
    anchor: Annotated[str, typer.Option(metavar="FIGURE", help="Measure the model beside this one.")] = "",
    data: Annotated[str, typer.Option(metavar="FILE", help="WikiText-2's test split; the hub's by default.")] = "",
    activations: Annotated[int, typer.Option(min=0, help="Bits of a packed model's activations; 0: its own.")] = 0,
    quick: Quick = False,
    minutes: Minutes = 0,
) -> None:
    """Perplexity, divergence, agreement, a task and true bits by recipe; or a model of one's own beside a figure."""
    from benchmarks.cli_anchors import measured_anchor, print_anchors, tell_verdict

    if anchors:
        print_anchors()
    elif anchor:
        beside = measured_anchor(anchor, model=model, data=data, activations=activations)
        _kept("anchors", [beside])
        tell_verdict(beside)
    else:
        from benchmarks import quality as kind
        from benchmarks.record import record

        def keep(found: Row) -> None:  # a row takes minutes: each is written as soon as it is there
            name = "quality-fair" if fair else f"{'ends' if ends else 'quality'}-{found['model']}"
            record(name, [found], command=_asked)

        with progress_bars() as progress:
            rows = kind.measure(
                progress, seed=None if seed < 0 else seed, quick=quick, outliers=outliers, pca=pca, ways=row or (),
                fair=fair, ends=ends, calibration_seed=None if calibration_seed < 0 else calibration_seed, keep=keep,
                model=Path(model) if model else None, tokens=tokens, budget=_budget(minutes), sequences=sequences,
            )  # fmt: skip
        _shown("ends" if ends else "quality", rows)


@app.command(epilog=examples("bwla-compile bench raw --outliers"))
def raw(
    outliers: Annotated[bool, typer.Option("--outliers", help="The model with heavy-tailed activations.")] = False,
    row: Annotated[list[str] | None, typer.Option(metavar="WAY", help="This row alone; repeatable.")] = None,
    quick: Quick = False,
) -> None:
    """Perplexity of raw models under torch.compile, by where their calibration comes from."""
    from benchmarks import raw as kind

    with progress_bars() as progress:
        rows = kind.measure(progress, quick=quick, outliers=outliers, ways=row or ())
    _kept("raw", rows)


@app.command(
    epilog=examples(
        "bwla-compile bench quantize demo: --set tuning.steps=0",
        "bwla-compile bench quantize benchmarks/configs/qwen3-8b.json --recipe rtn --layers 8 --layers 36",
    )
)
def quantize(
    model: Subject = "demo:",
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a .toml file.")] = "bwla-w1a6",
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE")] = None,
    calibration: Annotated[str, typer.Option(help="self, random, none, or a file.")] = "random",
    layers: Annotated[list[int] | None, typer.Option(min=1, help="Of a config: so many blocks; repeatable.")] = None,
    vocab: Vocab = 0,
    folder: Annotated[Path | None, typer.Option(help="Where there is space for the model and its packed form.")] = None,
) -> None:
    """Seconds and memory of quantizing from folder to folder, by block and by stage."""
    from benchmarks import quantize as kind

    with progress_bars() as progress:
        rows = kind.measure(
            progress, model=model, recipe=recipe, changes=changes or (), calibration=calibration, layers=layers or (),
            vocab=vocab, folder=folder,
        )  # fmt: skip
    _kept("quantize", rows)


@app.command(epilog=examples("bwla-compile bench gguf demo:", "bwla-compile bench gguf DIR --tokens wiki.txt"))
def gguf(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="demo:, or a folder, of floats or packed.")] = "demo:",
    tokens: Annotated[Path | None, typer.Option(metavar="FILE", help="Text of a folder, or ids.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Windows that are read.")] = 24,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    quick: Quick = False,
    threads: Threads = 1,
) -> None:
    """Hold `export --to gguf` to llama.cpp: one packed model's perplexity there and here; exit code 1 beyond 1%."""
    from benchmarks import gguf_agreement as kind

    with progress_bars() as progress:
        rows = kind.measure(
            progress, model=model, tokens=tokens, sequences=sequences, length=length, quick=quick, threads=threads
        )
    _kept("gguf", rows)
    if not rows[-1]["agrees"]:
        raise typer.Exit(1)


@app.command(epilog=examples("bwla-compile bench demo"))
def demo(quick: Quick = False) -> None:
    """The main job's tables as results."""
    from benchmarks import demo_table as kind

    with progress_bars() as progress:
        rows = kind.measure(progress, quick=quick)
    _kept("demo", rows)


@app.command("compile-time", epilog=examples("bwla-compile bench compile-time"))
def compile_time() -> None:
    """Seconds to the first result of the embedded model, packed and raw, cold and warm."""
    from benchmarks import compile_time as kind

    with progress_bars() as progress:
        rows = kind.measure(progress)
    _kept("compile_time", rows)


@app.command(epilog=examples("bwla-compile bench text"))
def text() -> None:
    """Greedy text of the packed embedded model, compiled against eager: where they part, and how near the tie was."""
    from benchmarks import text as kind

    with progress_bars() as progress:
        rows = kind.measure(progress)
    _kept("text", rows)


@app.command("kv-cache", epilog=examples("bwla-compile bench kv-cache"))
def kv_cache() -> None:
    """An int8 KV cache against one of floats on the embedded model: bytes, perplexity, greedy text."""
    from benchmarks import kv_cache as kind

    with progress_bars() as progress:
        rows = kind.measure(progress)
    _kept("kv_cache", rows)


@app.command(
    epilog=examples("bwla-compile bench profile demo:", "bwla-compile bench profile OUT --trace trace.json --threads 2")
)
def profile(
    model: Subject = "demo:",
    way: Annotated[str, typer.Option(help="The way to run it; see bench models.")] = "bwla",
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a Chrome trace.")] = None,
    floats: Annotated[str, typer.Option(metavar="DIR", help="The original of a packed folder.")] = "",
    layers: Layers = 0,
    vocab: Vocab = 0,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded.")] = 16,
    threads: Threads = 1,
) -> None:
    """Where a decode step goes: by region, by kernel, and between them."""
    from tempfile import TemporaryDirectory

    from benchmarks.shown import profile_tables
    from benchmarks.step_profile import profile_step
    from benchmarks.subject import make_subject

    with progress_bars() as progress, TemporaryDirectory() as work:
        subject = make_subject(model, work=Path(work), floats=floats, layers=layers, vocab=vocab, progress=progress)
        found = profile_step(subject, way=way, steps=steps, threads=threads, trace=trace, progress=progress)
    console = stdout_console()
    for table in profile_tables(found):
        console.print(render_table(table))
    _kept("profile", found.rows(subject.label))
    if trace:
        console.print(f"wrote {trace}: open it in chrome://tracing or ui.perfetto.dev", highlight=False)


@app.command(
    epilog=examples("bwla-compile bench train llama -o LLAMA --minutes 60", "bwla-compile bench quality --model LLAMA")
)
def train(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="llama, gpt2, moe or qwen3.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Checkpoint, then the model.")],
    minutes: Annotated[float, typer.Option(min=0, help="Of training, all runs together.")] = 20,
    steps: Annotated[int, typer.Option(min=0, help="In place of minutes.")] = 0,
    hidden: Annotated[int, typer.Option(min=16, help="Width.")] = 384,
    layers: Annotated[int, typer.Option(min=1, help="Blocks.")] = 6,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step, of 256 tokens.")] = 8,
    optimizer: Annotated[str, typer.Option(help="muon, or adamw for all parameters.")] = "muon",
    schedule: Annotated[str, typer.Option(help="Of the rate: level and then falling, or cosine.")] = "level",
    package: Annotated[list[str] | None, typer.Option(help="Read its docstrings too; installed; repeatable.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Steps by torch.compile: faster after a minute.")] = False,
    vocab: Annotated[int, typer.Option(min=257, help="Tokens of its vocabulary.")] = 4096,
    seed: Seed = 0,
) -> None:
    """Train a model of another family from the embedded model's text; the same command goes on where it was stopped."""
    from benchmarks.families import FAMILIES, Size
    from benchmarks.training import Job, Optimizer, Schedule, train_family

    if family not in FAMILIES:
        raise typer.BadParameter(f"no family is called {family!r}; there are {', '.join(FAMILIES)}")
    if optimizer not in get_args(Optimizer):
        raise typer.BadParameter(f"no optimizer is called {optimizer!r}; there are {', '.join(get_args(Optimizer))}")
    if schedule not in get_args(Schedule):
        raise typer.BadParameter(f"no schedule is called {schedule!r}; there are {', '.join(get_args(Schedule))}")
    job = Job(
        family, out, minutes=minutes, steps=steps, size=Size(hidden, layers), packages=tuple(package or ()),
        vocab_size=vocab, batch=batch, seed=seed, optimizer=cast("Optimizer", optimizer),
        schedule=cast("Schedule", schedule), compiled=compiled,
    )  # fmt: skip
    with progress_bars() as progress:
        facts = train_family(job, progress=progress)
    stdout_console().print(
        f"{out}: {facts['steps']} steps, {facts['n_tokens']:,} tokens, {facts['n_parameters']:,} parameters, loss "
        f"{facts['loss']:.3f} after {facts['seconds']:.0f} s", highlight=False,
    )  # fmt: skip


@app.command(epilog=examples("bwla-compile bench report"))
def report() -> None:
    """Draw the plots, and rewrite the marked blocks of README.md and docs/benchmarks.md, from results alone."""
    from benchmarks.report import report as write

    for path in write():
        stdout_console().print(f"wrote {path}", highlight=False)


@app.command(epilog=examples("bwla-compile bench compare OLD.jsonl NEW.jsonl"))
def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD")],
    new: Annotated[Path, typer.Argument(metavar="NEW")],
    every: Annotated[bool, typer.Option("--all", help="Also what is within the noise.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Say what became slower, larger or worse beyond the noise; exit code 1 where anything did."""
    import json
    from dataclasses import asdict

    from benchmarks.compare import compare as changes_of
    from benchmarks.record import read
    from benchmarks.shown import changes_table

    changes = changes_of(read(old), read(new))
    stdout_console().print(render_table(changes_table(changes, every=every)))
    if json_file:
        write_text(json_file, json.dumps([asdict(change) for change in changes], indent=1) + "\n")
    if any(change.worse for change in changes):
        raise typer.Exit(1)


@app.command("all", epilog=examples("bwla-compile bench all --minutes 15"))
def everything(minutes: Minutes = 15) -> None:
    """What `make bench` does: every kind within a budget, then the report; exit code 1 where a kind failed."""
    from benchmarks.errors import ResultsError
    from benchmarks.everything import failure, measure_everything

    failed = []
    with progress_bars() as progress:
        for part in measure_everything(progress, budget=_budget(minutes)):
            if part.failed:
                failed.append(part.failed)
            else:
                _kept(part.kind, part.rows, part.label)
    try:
        report()
    except Exception as error:  # what failed before it must still be said
        failed.append(failure("report", error))
    if failed:
        raise ResultsError(f"failed: {'; '.join(failed)}. All else was measured and is kept")

"""The command line, bwla-compile: the commands that show, check and emit, and those of the other cli_ files."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from bwla_compiler import cli_bench, cli_inspect, cli_packing
from bwla_compiler.cli_options import (
    Device,
    JsonFile,
    Model,
    OutFolder,
    RecipeName,
    Seed,
    examples,
    progress_bars,
    stdout_console,
    write_text,
)
from bwla_compiler.errors import BwlaError, PlanError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.inspector.table import Cell, Table, row, size
from bwla_compiler.inspector.terminal import print_report, render_table
from bwla_compiler.recipe import builtin_recipes, load_recipe
from bwla_compiler.settings import settings
from bwla_compiler.zoo.extent import Extent

app = typer.Typer(
    name="bwla-compile",
    help="Compile a decoder LM to 1-bit weights and low-bit activations.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog=examples("bwla-compile demo --quick", "bwla-compile inspect demo:", "bwla-compile quantize DIR -o OUT"),
)

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer carries its own copy of click, or uses click's


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0; 1 for an error, said in one line; 2 for wrong usage."""
    try:
        debug = settings().debug
    except BwlaError as error:
        return _fail(str(error), code=1)
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s: %(message)s")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.filterwarnings("ignore", category=FutureWarning)
    command = typer.main.get_command(app)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no such characters shows the others
    try:
        code = command.main(
            list(sys.argv[1:] if arguments is None else arguments), "bwla-compile", standalone_mode=False
        )
        sys.stdout.flush()
    except UsageError as error:
        message: str = getattr(error, "format_message", error.__str__)()
        return _fail(message, code=2) if message else 2  # no message: the help was asked for and is printed
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", code=130)
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        return 1
    except (BwlaError, OSError) as error:  # of the operating system: what is printed cannot be written, for example
        if debug:
            raise
        return _fail(str(error), code=1)
    if code == 130:  # typer's own answer to an interrupt
        return _fail("interrupted", code=130)
    return code if isinstance(code, int) else 0


def _fail(message: str, *, code: int) -> int:
    line = " ".join(message.split())
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), (line, "red")), soft_wrap=True)
    return code


@app.command(epilog=examples("bwla-compile demo", "bwla-compile demo --quick --json result.json"))
def demo(
    json_file: JsonFile = None,
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="The page to write.")] = Path("report.html"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tokens: rougher figures, sooner.")] = False,
) -> None:
    """The main job on the embedded models: quantize, compare recipes, time, and write a page."""
    from bwla_compiler.inspector.results import result_tables
    from bwla_compiler.main_job import run_demo

    with progress_bars() as progress:
        result = run_demo(json_path=json_file, html_path=html, quick=quick, progress=progress)
    out = stdout_console()
    for table in result_tables(result):
        out.print(render_table(table))
        out.print()
    out.print(f"wrote {html}" + (f" and {json_file}" if json_file else ""), highlight=False)


cli_packing.add_commands(app)


cli_inspect.add_commands(app)


cli_bench.add_commands(app)


@app.command(
    epilog=examples("bwla-compile plan DIR --json plan.json", "bwla-compile plan config.json --graphml plan.graphml")
)
def plan(
    model: Model,
    json_file: JsonFile = None,
    graphml: Annotated[
        Path | None, typer.Option("--graphml", metavar="FILE", help="Also write the plan as a graph, for Gephi or yEd.")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Plan a model and write the plan as data, keyed by parameter name; a config.json is enough."""
    from bwla_compiler import api
    from bwla_compiler.graph.network import chains, to_graphml
    from bwla_compiler.inspection import packed_config
    from bwla_compiler.inspector.report import build_report
    from bwla_compiler.inspector.terminal import summary

    with progress_bars() as progress:
        loaded = api.skeleton(model, device=device, progress=progress)
        packed = packed_config(loaded.model)
        found, repeated = (Plan.from_dict(packed.plan), None) if packed else api.quick_plan(loaded.model)
    for path, text in ((json_file, found.to_json), (graphml, lambda: to_graphml(found))):
        if path:
            write_text(path, text())
    written = [str(path) for path in (json_file, graphml) if path]
    out = stdout_console()
    out.print(summary(build_report(found)), highlight=False)
    out.print(f"{len(found.free)} free bases in {len(chains(found))} chains", highlight=False)
    if repeated:
        out.print(str(repeated), highlight=False)
    if written:
        out.print(f"wrote {' and '.join(written)}", highlight=False)


@app.command(epilog=examples("bwla-compile verify demo:outliers --seed 3"))
def verify(model: Model, seed: Seed = 0, device: Device = "cpu") -> None:
    """Check that rotations change nothing: random ones in every free space, no quantization, float64."""
    from bwla_compiler import api
    from bwla_compiler.inspector.report import build_report

    with progress_bars() as progress:
        loaded = api.load(model, device=device, progress=progress)
        result = api.verify(loaded.model, seed=seed, progress=progress)
    out = stdout_console()
    print_report(build_report(result.plan, source=model), out)
    out.print(
        f"{result.n_free} free spaces rotated: relative logit error {result.error:.2e}, allowed {result.tolerance:.0e}",
        highlight=False,
    )
    if result.n_free == 0:
        raise PlanError(f"{model}: no space is free, so nothing was verified; the reasons are above")
    if not result.passed:
        raise PlanError(f"{model}: the rotated model differs; please report this with the model's name")
    out.print("verified", style="green")


@app.command(
    epilog=examples(
        "bwla-compile zoo llama gpt2 mixtral --compile whole",
        "bwla-compile zoo --markdown docs/architectures.md --json rows.json",
    )
)
def zoo(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAMES]...", help="Types of model; all if none.")
    ] = None,
    json_file: JsonFile = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the result as Markdown.")
    ] = None,
    extent: Annotated[
        Extent,
        typer.Option(
            "--compile",
            help="How far each is quantized and compiled: none, up to Inductor's door, the whole way (most of a minute "
            "each), or a sample the whole way and the others up to the door.",
        ),
    ] = Extent.SAMPLE,
    limit_seconds: Annotated[float, typer.Option(min=1, help="Wall time that one architecture may take.")] = 600.0,
    workers: Annotated[int, typer.Option(min=1, max=2, help="Processes side by side.")] = 1,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep each row there as it is made; a run with the same FILE goes on."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Verify, quantize and compile a tiny model of every architecture that transformers knows as a causal LM."""
    from bwla_compiler.zoo.journal import Journal
    from bwla_compiler.zoo.models import known
    from bwla_compiler.zoo.table import summary, to_json, to_markdown, versions
    from bwla_compiler.zoo.workers import run_zoo

    chosen = known(names or [])
    conditions = {"seed": seed, "extent": extent.value, "versions": versions()}
    with progress_bars() as progress:
        rows = run_zoo(
            chosen,
            seed=seed,
            extent=extent,
            limit_seconds=limit_seconds,
            workers=workers,
            progress=lambda name, done, total: progress("architectures", done, total),
            keep=Journal(keep, conditions) if keep else None,
        )
    command = " ".join(["bwla-compile zoo", *(names or []), f"--seed {seed} --compile {extent}"])
    if json_file:
        write_text(json_file, to_json(rows, command=command, versions=versions()))
    if markdown:
        write_text(markdown, to_markdown(rows, command=command, versions=versions()))
    _print_zoo(rows, summary(rows))


def _print_zoo(rows: Sequence[Any], line: str) -> None:
    """Print a row an architecture; raise PlanError where folding changed what one computes."""
    cells = tuple(
        row(
            found.name,
            found.status,
            *(found.decisions.get(d, 0) for d in ("folded", "partial", "online", "alone")),
            f"{found.share:.0%}",
            "" if found.error is None else f"{found.error:.0e}",
            "" if found.compiled is None else found.compiled.status,
            found.reason or (found.compiled.reason if found.compiled else ""),
        )
        for found in rows
    )
    columns = ("architecture", "status", ">folds", ">partial", ">online", ">alone", ">quantized", ">error", "compiled")
    out = stdout_console()
    mean = sum(found.seconds for found in rows) / max(1, len(rows))
    out.print(render_table(Table("", (*columns, "reason"), cells, f"{line}; {mean:.1f} s a row")))
    for status, what in (("status", "folding"), ("compiled", "compiling"), ("raw", "compiling")):
        if wrong := [x.name for x in rows if "wrong" in (found := getattr(x, status), getattr(found, "status", ""))]:
            raise PlanError(f"{', '.join(wrong)}: {what} changes what the model computes; please report this")


@app.command(epilog=examples("bwla-compile recipes", "bwla-compile recipes bwla-w1a6"))
def recipes(name: Annotated[str, typer.Argument(metavar="[NAME]", help="Show this recipe's fields.")] = "") -> None:
    """List the recipes, or show the fields of one; --set changes them by these names."""
    if name:
        found = load_recipe(name)
        out = stdout_console()
        out.print(render_table(Table(found.name, ("field", "value"), tuple(_fields(found.to_dict())))))
        return
    from bwla_compiler.inspector.recipes import recipe_table

    stdout_console().print(render_table(recipe_table(builtin_recipes().values())))


def _fields(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[Cell, ...]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")
        elif value != ():
            yield row(prefix + key, str(value).lower() if isinstance(value, bool) else str(value))


@app.command(epilog=examples("bwla-compile doctor"))
def doctor() -> None:
    """Say what this machine has, and what follows from it."""
    from bwla_compiler.inspector.machine import machine_table

    stdout_console().print(render_table(machine_table()))


@app.command(
    "emit",
    epilog=examples(
        "bwla-compile emit demo: --target cuda:90 -o kernels",
        "bwla-compile emit DIR --target hip:gfx942 -o OUT --recipe bwla-w1a8",
        "bwla-compile emit demo: --target cpu -o kernels",
        "bwla-compile emit demo: --target cpu:neon -o kernels",
    ),
)
def emit_kernels(
    model: Model,
    target: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="cuda:90, hip:gfx942 and alike, cpu, or cpu:ISA with ISA one of amx, avx512vbmi, avx512, avx2, neon, "
            "portable; neither the GPU nor such a processor need be there (a cross compiler is named in BWLA_CXX).",
        ),
    ],
    out: OutFolder,
    recipe: RecipeName = "bwla-w1a6",
) -> None:
    """Write the kernels of a model, source and compiled, and say what they use of the target."""
    from bwla_compiler import api
    from bwla_compiler.emit import emit

    with progress_bars() as progress:
        loaded = api.load(model, progress=progress)
        report = emit(loaded.model, target, out, recipe=recipe, progress=progress)
    console = stdout_console()
    console.print(render_table(_kernel_table(report)))
    console.print(f"wrote {len(report.kernels)} kernels and resources.json to {out}", highlight=False)


def _kernel_table(report: Any) -> Table:
    columns = ("kernel", "what", ">warps", ">registers", ">stack", ">shared", ">instructions")
    rows = []
    for kernel in report.kernels:
        r = kernel.resources
        shared = "-" if r is None else size(r.shared_bytes) if kernel.holds else f"{size(r.shared_bytes)}: too much"
        used = (None, None, None) if r is None else (r.registers, r.stack_bytes, r.instructions)
        rows.append(row(kernel.name, Cell(kernel.title, "quiet"), kernel.warps, *used[:2], shared, used[2]))
    note = f"{len(report.groups)} distinct specs; registers a thread, stack bytes a thread, shared memory a program"
    broken = [f"{kernel.title}: {'; '.join(kernel.broken)}" for kernel in report.kernels if kernel.broken]
    note += "".join(f"\nbreaks a limit: {line}" for line in broken)
    return Table(f"{report.target}, {report.compiler}", columns, tuple(rows), note)

"""The tables of README.md and docs/benchmarks.md, each from the rows of one file of results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernel_tables import kernels_table, prologues_table, transforms_table
from benchmarks.markdown import LESS, MORE, Cell, Column, ending, table
from benchmarks.record import Row, devices, grouped, last_runs, latest, machines, read
from bwla_compiler.inspector.table import size

MIB = 1 << 20


def _mib(n_bytes: float | None) -> float | None:
    return None if n_bytes is None else n_bytes / MIB


def demo_tables(rows: Sequence[Row]) -> str:
    """Return perplexities of the main job, a table a model, and its decode speeds: of the last run alone."""
    rows = [row for row in rows if row["when"] == rows[-1]["when"]]
    fitted = [row for row in rows if "recipe" in row]
    columns = [Column("recipe", left=True), *(Column(f"A{bits}", LESS) for bits in (16, 8, 6, 4))]
    columns += [Column("true bits"), Column("file")]
    about = rows[-1]
    parts = [
        f"Perplexity on held-out text, {about['test_sequences']} sequences of {about['length']} tokens; "
        f"{about['calibration_sequences']} sequences of calibration. Lower is better; columns are activation bits."
    ]
    for model in dict.fromkeys(row["model"] for row in fitted):
        cells = [_demo_cells(row) for row in fitted if row["model"] == model]
        parts.append(f"**{model}**\n\n{table(columns, cells)}")
    timed = [row for row in rows if "way" in row]
    if timed:
        speeds = [[row["way"], row["tokens_per_second"]] for row in timed]
        parts.append(table([Column("greedy decode", left=True), Column("tokens/s", MORE, 1)], speeds))
        parts.append(f"{timed[0]['method']}; rounds: {timed[0]['rounds']}.")
    return "\n\n".join([*parts, ending(rows)])


def _demo_cells(row: Row) -> list[Cell]:
    if row["recipe"] == "fp":  # its perplexity has no activation bits: it stands in the first column, and is no rival
        return ["fp", f"{row['perplexity']:.2f}", "", "", "", "-", size(row["n_bytes"])]
    perplexities = (row[f"a{bits}"] for bits in (16, 8, 6, 4))
    return [row["recipe"], *perplexities, row["true_bits"], size(row["n_bytes"])]


def models_table(rows: Sequence[Row]) -> str:
    """Return speed, memory and compile time, a table a model.

    A way that the last run of a model has no figures of keeps those of an earlier run, and says so: its ratio is of its
    own rounds.
    """
    case = ("model", "prompt", "steps", "threads")
    columns = [
        Column("way", left=True), Column("decode, tokens/s", MORE, 1), Column("quartiles"), Column("time over bwla's"),
        Column("prefill, tokens/s", MORE, 1), Column("first token, ms", LESS, 1), Column("weights, MiB", LESS, 1),
        Column("peak while it runs, MiB", LESS, 0), Column("compile cold, s", LESS, 1), Column("warm, s", LESS, 1),
        Column("top-1, %"),
    ]  # fmt: skip
    parts = []
    for (model, prompt, steps, threads), chosen in grouped(latest(rows, by=(*case, "way")), by=case).items():
        last = max(row["when"] for row in chosen)
        cells = [_model_cells(row, last=last) for row in chosen if "decode_tokens_per_second" in row]
        title = f"**{model}**, prompt of {prompt}, {steps} tokens decoded, batch 1, {threads} threads"
        parts += [f"{title}\n\n{table(columns, cells)}\n\n{ending(chosen)}"] if cells else []
    return "\n\n".join(parts)


def _model_cells(row: Row, *, last: str) -> list[Cell]:
    top1 = row.get("top1_fp32")
    way = row["way"] if row["when"] == last else f"{row['way']} (earlier, at {row['commit']})"
    return [
        way, row["decode_tokens_per_second"], f"{row['decode_low']:.1f}-{row['decode_high']:.1f}",
        row.get("times_ours"), row["prefill_tokens_per_second"], row["first_token_ms"], _mib(row.get("n_bytes")),
        row.get("recent_mib"), row.get("compile_cold_seconds"), row.get("compile_warm_seconds"),
        None if top1 is None else f"{top1:.1%}".rstrip("%"),
    ]  # fmt: skip


SAME_TEXT = ("model", "files", "fp_perplexity")
SAME_FIT = ("way", "table", "seed", "calibration_sequences")
"""What must be equal for perplexities to be set side by side: the model and the text."""


def quality_table(rows: Sequence[Row]) -> str:
    """Return perplexity over the float model's against true bits, a table a model; intervals of 95% over files."""
    rows = latest(rows, by=(*SAME_TEXT, *SAME_FIT))
    columns = [Column("way", left=True), Column("table", left=True), Column("true bits")]
    columns += [Column(f"A{bits}", LESS, 3) for bits in (16, 6, 4)]
    columns += [Column("A6, 95%"), Column("A6, code", LESS, 3), Column("fit, s", LESS, 1)]
    parts: list[str] = []
    for (model, files, _), mine in grouped(rows, by=SAME_TEXT).items():
        chosen = _told_apart(sorted(mine, key=lambda r: (float(r["true_bits"]), float(r["a6"]))))
        cells = [
            [
                r["way"],
                r["table"],
                r["true_bits"],
                r["a16"],
                r["a6"],
                r["a4"],
                r["a6_95"],
                r.get("a6_ood"),
                r["fit_seconds"],
            ]
            for r in chosen
        ]
        texts = "" if files is None else f", {files} files of held-out text"
        if trained := next((row for row in reversed(chosen) if row.get("trained_tokens")), None):
            texts += f"; {trained['n_parameters'] / 1e6:.1f}M parameters, {trained['trained_tokens'] / 1e6:.1f}M tokens"
        title = f"**{model}**, float perplexity {chosen[0]['fp_perplexity']:.2f}{texts}"
        parts += filter(None, [f"{title}\n\n{table(columns, cells)}", _beside_float(chosen), ending(chosen)])
    return "\n\n".join(parts)


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose names say what else differs between those of one name."""
    named: list[Row] = []
    for row in rows:
        alike = [other for other in rows if (other["way"], other["table"]) == (row["way"], row["table"])]
        says = [
            f"{row[column]} {what}" if column == "calibration_sequences" else f"{what} {row[column]}"
            for column, what in (("calibration_sequences", "sequences"), ("seed", "calibration seed"))
            if column in row and len({other.get(column) for other in alike}) > 1
        ]
        named.append({**row, "way": ", ".join([row["way"], *says])})
    return named


BESIDE_FLOAT = (("KL", "kl", LESS, 3, 1), ("top-1, %", "top1", MORE, 1, 100), ("task, %", "task", MORE, 1, 100))
"""Of figures by activation bits: heading, the end of their columns' names, which end is better, decimals, factor."""


def _beside_float(rows: Sequence[Row]) -> str:
    """Return divergence, agreement and the task of the rows that have them; "" where none has."""
    rows = [row for row in rows if "a6_kl" in row]
    if not rows:
        return ""
    columns, cells = [Column("way", left=True), Column("table", left=True)], [[r["way"], r["table"]] for r in rows]
    for heading, name, better, decimals, factor in BESIDE_FLOAT:
        for key, bits in ((f"a{bits}_{name}", bits) for bits in (16, 6, 4)):
            if any(key in row for row in rows):
                columns.append(Column(f"{heading}, A{bits}", better, decimals))
                for cell, row in zip(cells, rows, strict=True):
                    cell.append(factor * row[key] if key in row else None)
    said = "KL: nats a token from the float model's predictions. top-1: tokens that both find likeliest."
    if asked := next((row for row in rows if "fp_task" in row), None):
        said += f" task: of {asked['questions']} beginnings of held-out text, those whose ending is told from three of"
        share, n = asked["fp_task"], asked["questions"]
        said += f" other files (float model {100 * share:.1f}, chance 25.0; one standard deviation of so many"
        said += f" questions is {100 * (share * (1 - share) / n) ** 0.5:.1f})."
    return f"{table(columns, cells)}\n\n{said}"


def ends_table(rows: Sequence[Row]) -> str:
    """Return perplexity over the float model's by how embedding and head are stored, and bits of the whole model."""
    rows = latest(rows, by=(*SAME_TEXT, "way"))
    columns = [Column("model", left=True), Column("ends", left=True), Column("bits, whole model"), Column("bytes")]
    columns += [Column(f"A{bits}", LESS, 4) for bits in (16, 6)] + [Column("A16, 95%")]
    cells = [[r["model"], r["way"], r["model_bits"], size(r["n_bytes"]), r["a16"], r["a6"], r["a16_95"]] for r in rows]
    return f"{table(columns, cells)}\n\n{ending(rows)}"


def quantize_table(rows: Sequence[Row]) -> str:
    """Return seconds and peak memory of quantizing, the whole and the dearest block."""
    case = ("model", "recipe", "settings", "calibration")
    rows = latest(rows, by=(*case, "block"))
    columns = [Column("model", left=True), Column("recipe", left=True), Column("calibration", left=True)]
    columns += [Column("all, s", decimals=1), Column("dearest block, s", decimals=1), Column("most, MiB", decimals=0)]
    columns += [Column("a block, MiB", decimals=0), Column("true bits", decimals=3)]
    cells: list[list[Cell]] = []
    for key, found in grouped(rows, by=case).items():
        blocks = [r for r in found if r["block"] != "all"]
        for whole in (r for r in found if r["block"] == "all"):
            most = [max((float(b[name]) for b in blocks), default=None) for name in ("seconds", "peak_mib")]
            recipe = " ".join(filter(None, key[1:3]))
            cells.append(
                [key[0], recipe, key[3], whole["seconds"], most[0], whole["peak_mib"], most[1], whole["true_bits"]]
            )
    return f"{table(columns, cells)}\n\n{ending(rows)}"


def profile_table(rows: Sequence[Row]) -> str:
    """Return where a decode step goes, a table a model and way: microseconds and shares by region."""
    case = ("model", "way", "threads")
    columns = [Column("region", left=True), Column("microseconds", decimals=0), Column("share, %", decimals=1)]
    parts = []
    for (model, way, threads), chosen in grouped(last_runs(rows, by=case), by=case).items():
        cells = [[row["region"], row["region_us"], 100 * row["share"]] for row in chosen]
        title = f"**{model}, {way}**: {chosen[0]['step_us']:,.0f} microseconds a step, under the profiler "
        title += f"{chosen[0]['profiled_us']:,.0f}" + (f"; threads: {threads}" if threads else "")
        parts.append(f"{title}\n\n{table(columns, cells)}\n\n{ending(chosen)}")
    return "\n\n".join(parts)


def compile_time_table(rows: Sequence[Row]) -> str:
    """Return seconds to the first result in a process of its own."""
    rows = latest(rows, by=("way",))
    columns = [Column("way", left=True), Column("first call cold, s", LESS, 1), Column("warm, s", LESS, 1)]
    cells = [[r["way"], r["first_call_cold_seconds"], r["first_call_warm_seconds"]] for r in rows]
    return f"{table(columns, cells)}\n\n{ending(rows)}"


def kv_cache_table(rows: Sequence[Row]) -> str:
    """Return what an int8 cache costs against one of float32, by model."""
    rows = latest(rows, by=("model", "bits"))
    columns = [Column("model", left=True), Column("cache", left=True), Column("KiB", decimals=0)]
    columns += [Column("perplexity", decimals=3), Column("same best token, %", decimals=1)]
    columns += [Column("equal greedy tokens of 200", decimals=1), Column("compiled and eager", decimals=1)]
    cells: list[list[Cell]] = [
        [
            row["model"], "float32" if row["bits"] > 8 else "int8", row["n_bytes"] / 1024, row["perplexity"],
            100 * row["same_best"], row["equal_tokens"], row.get("compiled_equal_tokens"),
        ]
        for row in rows
    ]  # fmt: skip
    return f"{table(columns, cells)}\n\n{ending(rows)}"


def gguf_table(rows: Sequence[Row]) -> str:
    """Return perplexities of exported models here and in llama.cpp, a table a model."""
    case = ("model", "recipe", "sequences", "length")
    columns = [Column("way", left=True), Column("perplexity", decimals=3), Column("over ours, A16", decimals=4)]
    columns += [Column("over ours, A8", decimals=4), Column("KL to ours, A16"), Column("top-1, %", decimals=1)]
    parts = []
    for key, chosen in grouped(latest(rows, by=(*case, "way")), by=case).items():
        cells: list[list[Cell]] = [
            [
                row["way"], row["perplexity"], row.get("against_a16"), row.get("against_a8"),
                f"{row['kl']:.1e}" if "kl" in row else None, 100 * row["top1"] if "top1" in row else None,
            ]
            for row in chosen
        ]  # fmt: skip
        title = f"**{key[0]}**, {key[1]}, {key[2]} sequences of {key[3]} tokens"
        parts.append(f"{title}\n\n{table(columns, cells)}\n\n{ending(chosen)}")
    return "\n\n".join(parts)


RAW_RIVAL = "hadamard-rtn"
"""What a raw model's recipes are held to: the rotation that needs no calibration, and rounding."""


def raw_table(rows: Sequence[Row]) -> str:
    """Return perplexities of raw models that torch.compile quantized, by recipe and calibration, a table a model."""
    case = ("model", "test_sequences", "inductor", "fp_perplexity")
    columns = [Column("recipe, calibration", left=True), Column("perplexity, A6", LESS)]
    columns += [
        Column("over float", LESS, 3),
        Column(f"over {RAW_RIVAL}", LESS, 3),
        Column("compiled and read, s", LESS, 0),
    ]
    parts = []
    for (model, sequences, inductor, fp), chosen in grouped(latest(rows, by=(*case, "way")), by=case).items():
        rival = next((row["perplexity"] for row in chosen if row["way"].startswith(RAW_RIVAL)), None)
        cells: list[list[Cell]] = [
            [r["way"], r["perplexity"], r["a6"], r["perplexity"] / rival if rival else None, r["seconds"]]
            for r in sorted(chosen, key=lambda row: float(row["a6"]))
        ]
        about = f", {sequences} sequences of held-out text" if sequences else ""
        about += "" if inductor else "; graphs as they are, without Inductor's code"
        title = f"**{model}**, float perplexity {fp:.2f}{about}"
        parts.append(f"{title}\n\n{table(columns, cells)}\n\n{ending(chosen)}")
    return "\n\n".join(parts)


def text_table(rows: Sequence[Row]) -> str:
    """Return where greedy text of the packed model, compiled, parts from eager, by prompt."""
    rows = latest(rows, by=("prompt",))
    columns = [Column("prompt", left=True), Column("equal greedy tokens of 200", decimals=0)]
    columns += [Column("the best two there, standard deviations", decimals=4), Column("same best token, %", decimals=1)]
    cells: list[list[Cell]] = [
        [str(row["prompt"] + 1), row["equal_tokens"], row["gap"], 100 * row["teacher_forced"]] for row in rows
    ]
    return f"{table(columns, cells)}\n\n{ending(rows)}"


@dataclass(frozen=True)
class Block:
    """A marked block: the files of results that it is made from, what makes a device's table ("" where its rows have no
    figures for it), and the command that measures it. every: tables of all machines, not of that measured last alone.
    """

    files: str
    make: Callable[[Sequence[Row]], str]
    command: str
    every: bool = False


BLOCKS = {
    "demo": Block("demo", demo_tables, "demo"),
    "models": Block("models", models_table, "models", every=True),
    "kernels": Block("kernels", kernels_table, "kernels", every=True),  # a machine's kernels are those of its processor
    "transforms": Block("kernels", transforms_table, "kernels"),
    "prologues": Block("kernels", prologues_table, "kernels"),
    "profile": Block("profile", profile_table, "profile"),
    "quality": Block("quality-*", quality_table, "quality", every=True),  # perplexities do not depend on the machine
    "ends": Block("ends-*", ends_table, "quality --ends"),
    "quantize": Block("quantize", quantize_table, "quantize"),
    "gguf": Block("gguf", gguf_table, "gguf"),
    "compile_time": Block("compile_time", compile_time_table, "compile-time"),
    "kv_cache": Block("kv_cache", kv_cache_table, "kv-cache"),
    "raw": Block("raw", raw_table, "raw"),
    "text": Block("text", text_table, "text"),
}
"""Blocks by the name of their marks."""


def block_text(name: str, folder: Path) -> str:
    """Return the Markdown of a block from the results in a folder: of the machine that such figures were last measured
    on, a table for each instruction set that its kernels were held to; never of two devices in one table.
    """
    block = BLOCKS[name]
    rows = [row for path in sorted(folder.glob(f"{block.files}.jsonl")) for row in read(path)]
    by_machine = ([block.make(found) for found in devices(mine)] for mine in machines(rows))
    made = [text for texts in by_machine if (text := "\n\n".join(filter(None, texts)))]
    shown = made if block.every else made[:1]
    return "\n\n".join(shown) or f"Not measured yet: `python -m benchmarks {block.command}`."

"""Quality against true bits: every recipe on one model, baselines also with the help that ours has.

Held-out perplexity at A16, A6 and A4 as a ratio to the float model's, with intervals from a bootstrap over held-out
files; KL divergence to the float model, top-1 agreement with it and a task (see `endings`) at the same widths; at A6
perplexity on text of another kind (code). Every row is fitted on the same calibration sequences.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.beside_float import beside_float, nats
from benchmarks.budget import Budget
from benchmarks.endings import accuracy, questions_of
from benchmarks.errors import ResultsError
from benchmarks.noise import Noise
from benchmarks.plots import new_figure, save
from benchmarks.quality_folder import from_folder
from benchmarks.quality_model import LENGTH, Subject, embedded, fresh, with_tails
from benchmarks.quality_rows import ENDS, QUICK, ROWS, Row, fair_rows
from bwla_compiler.calibrate.quantize import BATCH, quantize_model
from bwla_compiler.graph.capture import capture
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.modules import set_activation_bits

Progress = Callable[[str, int, int], None]

BITS = (16, 6, 4)
SEQUENCES, FILES = 96, 24
RESAMPLES = 2000
FLOOR = 1e-3
"""Least excess of a ratio over 1 that the plot shows."""
MARKS = {
    "as published": ("o", "0.45"), "fair": ("s", "tab:blue"), "fair, tuned": ("^", "tab:green"),
    "ours": ("D", "tab:red"),
}  # fmt: skip
"""Of each table's points: shape and colour."""


def measure(
    progress: Progress,
    *,
    seed: int | None = None,
    quick: bool = False,
    outliers: bool = False,
    pca: bool = False,
    ways: Sequence[str] = (),
    fair: bool = False,
    ends: bool = False,
    sequences: int = SEQUENCES,
    calibration_seed: int | None = None,
    model: Path | None = None,
    tokens: Path | None = None,
    budget: Budget | None = None,
    keep: Callable[[dict[str, Any]], object] | None = None,
) -> list[dict[str, Any]]:
    """Return a row per recipe. seed: of a fresh model and split (trained once, then cached); None: the embedded one.

    outliers: rewritten as demo:outliers is; pca: in its PCA basis, without heavy channels. ways: rows by name, none for
    all (or, where quick, for a few on less text). fair: the rows of the fair table; ends: those that differ in
    embedding and head. sequences: of calibration; calibration_seed: of their draw and of the fit, by default the
    model's. model, tokens: a folder, of `bench train` or any other, and its text in place of these models (see
    `quality_folder`). keep: gets each row as soon as it is there. budget: of wall time; rows that do not fit are not
    begun. Raises ResultsError for a name that no row has, and what `quality_folder` raises.
    """
    rows = fair_rows() if fair else ENDS if ends else ROWS
    if unknown := set(ways) - {row.way for row in rows}:
        raise ResultsError(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(r.way for r in rows)}")
    subject = _subject(
        model, tokens, seed=seed, outliers=outliers, pca=pca, files=8 if quick else FILES, progress=progress
    )
    chosen = ways or (QUICK if quick and not fair and not ends else [row.way for row in rows])
    drawn = (seed or 0) if calibration_seed is None else calibration_seed
    table = Table(subject, sequences=sequences, seed=drawn, progress=progress)
    return table.run([row for row in rows if row.way in chosen], budget=budget, keep=keep)


def _subject(
    model: Path | None,
    tokens: Path | None,
    *,
    seed: int | None,
    outliers: bool,
    pca: bool,
    files: int,
    progress: Progress,
) -> Subject:
    """Return the model of a folder, of a seed, or the embedded one, rewritten where that is asked for."""
    if model is None and seed is None and outliers:
        return embedded("demo:outliers", files=files)  # it is kept as it is
    if model is not None:
        subject = from_folder(model, tokens, files=files)
    elif seed is None:
        subject = embedded("demo:", files=files)
    else:
        subject = fresh(seed, files=files, progress=progress)
    return with_tails(subject, "heavy" if outliers else "pca") if outliers or pca else subject


class Table:
    """One subject's rows: the float model's losses are computed once, and one plan and graph serve all.

    The float model is held beside the one that is measured.
    """

    def __init__(self, subject: Subject, *, sequences: int, seed: int, progress: Progress) -> None:
        self.subject, self.seed, self.progress = subject, seed, progress
        self.float_model = model = subject.load()
        self.calibration = subject.calibration(sequences, seed=seed)
        self.graph = capture(model, batch=BATCH, length=LENGTH)
        self.plan = make_plan(model, graph=self.graph)
        self.fp = nats(model, subject.windows)
        self.fp_ood = nats(model, subject.ood) if subject.ood.numel() else None
        self.questions = questions_of(subject.windows, subject.files)
        self.fp_task = None if self.questions is None else accuracy(model, self.questions)

    def run(
        self,
        rows: Sequence[Row],
        *,
        budget: Budget | None = None,
        keep: Callable[[dict[str, Any]], object] | None = None,
    ) -> list[dict[str, Any]]:
        """Fit and measure rows in turn, as many as the budget allows. keep: gets each as soon as it is there."""
        found = []
        for done, row in enumerate((budget or Budget()).within(rows)):
            self.progress(f"quality, {self.subject.label}: {row.way}", done, len(rows))
            noise = Noise()
            found.append({**self._measure(row), **noise.fields()})
            if keep is not None:
                keep(found[-1])
        self.progress("quality", len(rows), len(rows))
        return found

    def _measure(self, row: Row) -> dict[str, Any]:
        model = self.subject.load()
        recipe = load_recipe(row.recipe, row.settings)
        report = quantize_model(model, recipe, self.calibration, plan=self.plan, graph=self.graph, seed=self.seed)
        about = {
            "way": row.way,
            "table": row.table,
            "recipe": row.recipe,
            "settings": str(row.settings),
            "model": self.subject.label,
            "n_parameters": sum(parameter.numel() for parameter in self.float_model.parameters()),
            "trained_tokens": self.subject.trained_tokens,
            "seed": self.seed,
            "calibration_sequences": len(self.calibration),
            "files": int(self.subject.files.unique().numel()),
            "true_bits": round(report.bits.linears, 4),
            "model_bits": round(report.bits.model, 4),
            "n_bytes": report.bits.n_bytes,
        }
        figures = self._perplexities(model) | self._tasks(model)
        return about | figures | {"fit_seconds": round(report.seconds["total"], 1)}

    def _perplexities(self, model: nn.Module) -> dict[str, Any]:
        """Return perplexities over the float model's, and how near the predictions are to its own."""
        figures: dict[str, Any] = {"fp_perplexity": round(float(self.fp.mean().exp()), 3)}
        for bits, found in beside_float(self.float_model, model, self.subject.windows, bits=BITS).items():
            low, middle, high = ratio(found.nats, self.fp, self.subject.files, seed=self.seed)
            figures |= {f"a{bits}": round(middle, 4), f"a{bits}_95": f"{low:.3f}-{high:.3f}"}
            figures |= {f"a{bits}_kl": round(found.kl, 5), f"a{bits}_top1": round(found.top1, 4)}
        if self.fp_ood is not None:
            set_activation_bits(model, 6)
            code = nats(model, self.subject.ood)
            figures["a6_ood"] = round(ratio(code, self.fp_ood, self.subject.ood_files, seed=self.seed)[1], 4)
        return figures

    def _tasks(self, model: nn.Module) -> dict[str, Any]:
        """Return accuracies of the task, the float model's beside them; nothing where the text makes no questions."""
        if self.questions is None or self.fp_task is None:
            return {}
        figures: dict[str, Any] = {"questions": len(self.questions.answers), "fp_task": round(self.fp_task, 4)}
        for bits in BITS:
            set_activation_bits(model, bits)
            figures[f"a{bits}_task"] = round(accuracy(model, self.questions), 4)
        return figures


def ratio(quantized: Tensor, fp: Tensor, files: Tensor, *, seed: int) -> tuple[float, float, float]:
    """Return (2.5%, value, 97.5%) of the perplexity ratio exp(mean(quantized - fp)), whole files drawn with return.

    quantized, fp [n] nats of windows; files [n] the number of each one's file.
    """
    _, owner = files.unique(return_inverse=True)
    n_files = int(owner.max()) + 1
    sums = torch.zeros(n_files, dtype=torch.float64).index_add_(0, owner, quantized - fp)
    counts = torch.zeros(n_files, dtype=torch.float64).index_add_(0, owner, torch.ones_like(fp))
    drawn = torch.randint(0, n_files, (RESAMPLES, n_files), generator=torch.Generator().manual_seed(seed))
    means = (sums[drawn].sum(1) / counts[drawn].sum(1)).exp()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, float((sums.sum() / counts.sum()).exp()), high


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Draw what perplexity loses against true bits at each activation width; None where matplotlib is not installed."""
    figure = new_figure(13, 4.6)
    if figure is None:
        return None
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for axes, bits in zip(figure.subplots(1, len(BITS), sharex=True, sharey=True), BITS, strict=True):
        for table, (marker, color) in MARKS.items():
            chosen = [r for r in rows if r["table"] == table]
            if not chosen:
                continue
            x, y, error = [r["true_bits"] for r in chosen], *_excess(chosen, bits)
            axes.errorbar(x, y, yerr=error, fmt=marker, color=color, capsize=2, label=table, markersize=5)
            for row, place, value in zip(chosen, x, y, strict=True):
                axes.annotate(row["way"], (place, value), (6, 3), textcoords="offset points", fontsize=6, color=color)
        axes.set_yscale("log")  # of the ratio less 1, so that what is near the float model stays apart
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 + value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("true bits a weight")
        axes.set_title(f"A{bits}")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("perplexity over the float model's")
    figure.axes[0].legend(loc="upper right")
    return save(figure, path)


def _excess(rows: Sequence[dict[str, Any]], bits: int) -> tuple[list[float], list[list[float]]]:
    """Return the ratios less 1, at least FLOOR, and how far their intervals reach below and above."""
    values = [max(FLOOR, row[f"a{bits}"] - 1) for row in rows]
    spans = [[max(FLOOR, float(end) - 1) for end in row[f"a{bits}_95"].split("-")] for row in rows]
    below = [max(0.0, value - span[0]) for value, span in zip(values, spans, strict=True)]
    above = [max(0.0, span[1] - value) for value, span in zip(values, spans, strict=True)]
    return values, [below, above]

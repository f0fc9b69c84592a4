"""Perplexity against true bits: every recipe on one model, baselines also with the help that ours has.

Held-out perplexity at A16, A6 and A4 as a ratio to the float model's, with intervals from a bootstrap over held-out
files, and at A6 on text of another kind (code). Every row is fitted on the same calibration sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.quality_folder import from_folder
from benchmarks.quality_model import LENGTH, Subject, embedded, fresh, with_outliers
from benchmarks.quality_rows import QUICK, ROWS, Row, fair_rows, recipe_for
from bwla_compiler.calibrate.quantize import BATCH, quantize_model
from bwla_compiler.graph.capture import capture
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.runtime.modules import set_activation_bits
from bwla_compiler.tokens import evaluating

Progress = Callable[[str, int, int], None]

BITS = (16, 6, 4)
SEQUENCES, FILES = 96, 24
RESAMPLES = 2000


@dataclass(frozen=True)
class Asked:
    """What is measured, on what.

    seed: of a fresh model and split (trained once, then cached); None: the embedded one. adamw: trained by AdamW alone
    in place of Muon. outliers: rewritten as demo:outliers is. model, tokens: a folder and its text in place of all
    these (see `quality_folder`). calibration_seed: of the calibration's draw and of the fit; None: that of the model.
    ways: rows by name, none for all (or, where quick, for a few on less text). fair: the rows of the fair table.
    """

    seed: int | None = None
    adamw: bool = False
    outliers: bool = False
    model: Path | None = None
    tokens: Path | None = None
    calibration_seed: int | None = None
    ways: Sequence[str] = ()
    fair: bool = False
    quick: bool = False


def measure(progress: Progress, asked: Asked) -> Iterator[dict[str, Any]]:
    """Give a row per recipe as soon as it is measured. Raises ValueError for a name that no row has."""
    rows = fair_rows() if asked.fair else ROWS
    if unknown := set(asked.ways) - {row.way for row in rows}:
        raise ValueError(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(r.way for r in rows)}")
    subject = _subject(asked, progress)
    chosen = asked.ways or (QUICK if asked.quick and not asked.fair else [row.way for row in rows])
    seed = (asked.seed or 0) if asked.calibration_seed is None else asked.calibration_seed
    table = Table(subject, sequences=SEQUENCES, seed=seed, progress=progress)
    yield from table.run([row for row in rows if row.way in chosen])


def _subject(asked: Asked, progress: Progress) -> Subject:
    files = 8 if asked.quick else FILES
    if asked.model is not None:
        return from_folder(asked.model, asked.tokens, files=files)
    if asked.seed is None and not asked.adamw:
        return embedded("demo:outliers" if asked.outliers else "demo:", files=files)
    subject = fresh(asked.seed or 0, adamw=asked.adamw, files=files, progress=progress)
    return with_outliers(subject) if asked.outliers else subject


class Table:
    """One subject's rows: the float model's losses are computed once, and one plan and graph serve all."""

    def __init__(self, subject: Subject, *, sequences: int, seed: int, progress: Progress) -> None:
        self.subject, self.seed, self.progress = subject, seed, progress
        model = subject.load()
        self.calibration = subject.calibration(sequences, seed=seed)
        self.graph = capture(model, batch=BATCH, length=LENGTH)
        self.plan = make_plan(model, graph=self.graph)
        self.fp = nats(model, subject.windows)
        self.fp_ood = None if subject.ood is None else nats(model, subject.ood)

    def run(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Fit and measure rows one after another."""
        for done, row in enumerate(rows):
            self.progress(f"quality, {self.subject.label}: {row.way}", done, len(rows))
            yield self._measure(row)
        self.progress("quality", len(rows), len(rows))

    def _measure(self, row: Row) -> dict[str, Any]:
        model, subject = self.subject.load(), self.subject
        recipe = recipe_for(row, self.plan)
        report = quantize_model(model, recipe, self.calibration, plan=self.plan, graph=self.graph, seed=self.seed)
        figures: dict[str, Any] = {
            "way": row.way,
            "table": row.table,
            "recipe": row.recipe,
            "settings": str(row.settings),
            "model": subject.label,
            "calibration_seed": self.seed,
            "true_bits": round(report.bits.linears, 4),
            "fp_perplexity": round(float(self.fp.mean().exp()), 3),
        }
        for bits in BITS:
            set_activation_bits(model, bits)
            low, middle, high = ratio(nats(model, subject.windows), self.fp, subject.files, seed=0)
            figures |= {f"a{bits}": round(middle, 4), f"a{bits}_95": f"{low:.3f}-{high:.3f}"}
        if subject.ood is not None and subject.ood_files is not None and self.fp_ood is not None:
            set_activation_bits(model, 6)
            code = nats(model, subject.ood)
            figures["a6_ood"] = round(ratio(code, self.fp_ood, subject.ood_files, seed=0)[1], 4)
        return figures | {"fit_seconds": round(report.seconds["total"], 1)}


def nats(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss of each window [n] float64, in nats per token."""
    found = []
    with evaluating(model):
        for rows in windows.split(BATCH):
            logits = model(input_ids=rows[:, :-1]).logits.float()
            losses = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
            found.append(losses.double().view(len(rows), -1).mean(1))
    return torch.cat(found)


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

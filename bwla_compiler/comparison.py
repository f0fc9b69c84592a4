"""One embedded model in floats and by every recipe of the main job: perplexities, bits and bytes."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bwla_compiler import api
from bwla_compiler.calibrate.quantize import BATCH, quantize_model
from bwla_compiler.calibrate.report import QuantizeReport
from bwla_compiler.checkpoint.hf import attach
from bwla_compiler.demo import demo_tokens
from bwla_compiler.evaluate.perplexity import perplexity
from bwla_compiler.graph.capture import capture
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.modules import set_activation_bits

Progress = Callable[[str, int, int], None]

RECIPES: dict[str, str] = {"rtn": "rtn", "hadamard-rtn": "hadamard-rtn", "bwla": "bwla-w1a6"}
"""Rows of the table: the weights of each are fitted once, its activations set per column."""

TUNING_STEPS = 20
"""A fifth of the recipe's: what the two minutes of the main job leave time for."""

ACTIVATION_BITS = (16, 8, 6, 4)
STAGES = 1 + len(RECIPES) * (1 + len(ACTIVATION_BITS))
"""Steps of a comparison: the float model's perplexity, and each row's fit and perplexities."""


@dataclass(frozen=True)
class Texts:
    """How much text a model is calibrated and tested on."""

    calibration_sequences: int
    test_sequences: int
    length: int


@dataclass(frozen=True)
class Comparison:
    """One embedded model's figures, and the last row's report without its edits, which hold the weights."""

    figures: dict[str, Any]
    report: QuantizeReport


def compare(name: str, progress: Progress, *, texts: Texts, folder: Path) -> Comparison:
    """Measure one embedded model, in floats and with every recipe; all start from one plan.

    Every model measured is saved as folder / saved_name(name, row). progress counts in hundredths of a stage.
    """
    stages = _Stages(name, progress)
    floats = api.load(name).model
    test = demo_tokens("test", sequences=texts.test_sequences, length=texts.length)
    calibration = demo_tokens("train", sequences=texts.calibration_sequences, length=texts.length - 1)
    fp = perplexity(floats, test, progress=stages.next())
    figures: dict[str, Any] = {"fp": {"perplexity": fp, "n_bytes": _save(floats, folder / saved_name(name, "fp"))}}
    # its sizes divide no axis of these models: the plan is the one that `make_plan` finds by itself
    graph = capture(floats, batch=BATCH, length=calibration.shape[1])
    plan = make_plan(floats, graph=graph)
    rows: dict[str, Any] = {}
    for row, recipe in RECIPES.items():
        packed = api.load(name).model
        chosen = load_recipe(recipe)
        chosen = load_recipe(chosen, {"tuning.steps": min(TUNING_STEPS, chosen.tuning.steps)})
        report = quantize_model(packed, chosen, calibration, plan=plan, graph=graph, progress=stages.next())
        attach(packed, recipe=report.recipe, plan=plan, bits=report.bits)
        n_bytes = _save(packed, folder / saved_name(name, row))
        rows[row] = {"true_bits": report.bits.linears, "n_bytes": n_bytes} | _perplexities(packed, test, stages)
    passes = tuple(dataclasses.replace(done, edits=[]) for done in report.passes)
    return Comparison(figures | {"recipes": rows}, dataclasses.replace(report, passes=passes))


def saved_name(name: str, row: str) -> str:
    """Return the name of the folder of an embedded model as a row has it; "fp" is the float model's."""
    return f"{name.replace(':', '-')}{row}"


class _Stages:
    """Stages run one after another, told as one count: hundredths of a stage."""

    def __init__(self, name: str, progress: Progress) -> None:
        self.name, self.progress = name, progress
        self.begun = 0

    def next(self) -> Progress:
        """Begin the next stage and return what it reports to."""
        before, self.begun = 100 * self.begun, self.begun + 1
        reached = 0

        def tell(label: str, done: int, total: int) -> None:
            nonlocal reached
            reached = max(reached, 100 * done // max(1, total))  # a stage of several counts never goes back
            self.progress(self.name, before + reached, 100 * STAGES)

        return tell


def _perplexities(model: nn.Module, tokens: Tensor, stages: _Stages) -> dict[str, float]:
    found = {}
    for bits in ACTIVATION_BITS:
        set_activation_bits(model, bits)
        found[f"a{bits}"] = perplexity(model, tokens, progress=stages.next())
    return found


def _save(model: nn.Module, folder: Path) -> int:
    """Save a model and return the bytes of its weights' files."""
    api.save(model, folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

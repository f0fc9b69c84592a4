"""What quantizing from folder to folder costs: seconds and memory by block and by stage, in a process of its own.

Memory is anonymous memory, sampled (see `memory`).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.errors import ContenderError
from benchmarks.memory import PeakMemory
from benchmarks.noise import Noise
from benchmarks.random_model import random_model
from bwla_compiler.calibrate.report import BlockReport
from bwla_compiler.errors import ModelError
from bwla_compiler.recipe import load_recipe, parse_setting

Progress = Callable[[str, int, int], None]
ROOT = Path(__file__).parent.parent
STAGES = ("planning", "blocks", "ends")
MIB = 1 << 20


def measure(
    progress: Progress,
    *,
    model: str = "demo:",
    recipe: str = "bwla-w1a6",
    changes: Sequence[str] = (),
    calibration: str = "random",
    layers: Sequence[int] = (),
    vocab: int = 0,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """Return a row per block and one of the whole ("all"), for each number of layers.

    model: a folder, demo:, or a config.json, whose weights are then random. changes: SECTION.FIELD=VALUE of the recipe.
    layers, vocab: of a config, by default its own. folder: where there is space for the model and its packed form.
    "all" holds the seconds of each part, and the most memory that the process held in each stage. Raises ContenderError
    where it fails, with its last line, ModelError where there is nothing to leave layers out of.
    """
    load_recipe(recipe, dict(parse_setting(text) for text in changes))  # a wrong name is said before anything is made
    drawn = model.endswith(".json")
    if layers and not drawn:
        raise ModelError(f"{model}: layers can be left out of a config alone; give its config.json")
    rows = []
    for number in layers or [0]:
        noise = Noise()
        with TemporaryDirectory(dir=folder) as place:
            label, source = model, model
            if drawn:
                source = str(Path(place) / "float")
                label = random_model(Path(model), Path(source), layers=number, vocab=vocab, progress=progress)
            job = {
                "source": source, "out": str(Path(place) / "packed"), "recipe": recipe, "changes": list(changes),
                "calibration": calibration,
            }  # fmt: skip
            found = _in_process(job, progress)
        about = {"model": label, "recipe": recipe, "settings": " ".join(changes), "calibration": calibration}
        rows += [{**about, **row, **noise.fields()} for row in found]
    return rows


def _in_process(job: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
    """Quantize in a process of its own and return its rows, told of as they come."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks.quantize", json.dumps(job)]
    rows = []
    with TemporaryDirectory() as place, (Path(place) / "errors").open("w+", encoding="utf-8") as errors:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    row = json.loads(line)
                    progress("quantizing: blocks", row.pop("done", 0), row.pop("total", 1))
                    rows.append(row)
        if process.returncode:
            errors.seek(0)
            lines = errors.read().strip().splitlines()
            raise ContenderError(f"quantizing {job['source']}: {lines[-1] if lines else 'no message'}")
    return rows


class Stages:
    """The most memory of each stage, in MiB: a sampler's recent peak belongs to the stage that is on."""

    def __init__(self, memory: PeakMemory) -> None:
        self.memory, self.stage, self.most = memory, STAGES[0], dict.fromkeys(STAGES, 0.0)

    def enter(self, stage: str) -> None:
        """Go on to a stage; nothing where it is on already."""
        if stage != self.stage:
            self.recent()
            self.stage = stage

    def recent(self) -> float:
        """Return the most since this was asked last, or since the stage began."""
        found = self.memory.fields()["recent_mib"]
        self.memory.forget()
        self.most[self.stage] = max(self.most[self.stage], found)
        return found


def quantize(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Quantize a folder and tell a row for each block as it is done, then one of the whole."""
    from bwla_compiler import api

    start, cpu = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        stages, before = Stages(memory), memory.fields()["recent_mib"]

        def told(label: str, done: int, total: int) -> None:
            if label == "quantizing":
                stages.enter("ends" if done == total else "blocks")

        def on_block(block: BlockReport) -> None:
            row = {"block": block.name, "seconds": round(block.seconds, 2), "peak_mib": stages.recent()}
            tell({**row, "true_bits": round(block.true_bits, 4), "done": block.done, "total": block.total})

        report = api.quantize_to(
            job["source"],
            job["out"],
            recipe=job["recipe"],
            settings=dict(parse_setting(text) for text in job["changes"]),
            calibration=job["calibration"],
            progress=told,
            on_block=on_block,
        )
        stages.recent()
    tell(
        {
            "block": "all",
            "seconds": round(time.perf_counter() - start, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "peak_mib": memory.fields()["peak_mib"],
            "true_bits": round(report.bits.linears, 4),
            "before_mib": before,
            **{f"{stage}_mib": most for stage, most in stages.most.items()},
            **{f"{name}_seconds": round(seconds, 2) for name, seconds in report.seconds.items() if name != "total"},
            "threads": torch.get_num_threads(),
            "written_mib": round(sum(path.stat().st_size for path in Path(job["out"]).iterdir()) / MIB, 1),
        }
    )


if __name__ == "__main__":
    quantize(json.loads(sys.argv[1]), lambda row: print(json.dumps(row), flush=True))

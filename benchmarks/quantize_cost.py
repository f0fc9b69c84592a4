"""What quantizing costs: seconds and peak memory of each block, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.errors import ContenderError
from benchmarks.memory import PeakMemory
from benchmarks.noise import Noise
from benchmarks.subject import random_model
from bwla_compiler.calibrate.report import BlockReport
from bwla_compiler.recipe import load_recipe, parse_setting

Progress = Callable[[str, int, int], None]
ROOT = Path(__file__).parent.parent


def measure(
    progress: Progress,
    *,
    model: str = "demo:",
    recipe: str = "bwla-w1a6",
    changes: Sequence[str] = (),
    calibration: str = "random",
    layers: int = 0,
    vocab: int = 0,
) -> list[dict[str, Any]]:
    """Return a row per block and one of the whole ("all").

    model: a folder, demo:, or a config.json, whose weights are then random. changes: SECTION.FIELD=VALUE of the recipe.
    "all" holds the seconds of each part, and the most memory that the process ever held. Raises ContenderError where it
    fails, with its last line.
    """
    load_recipe(recipe, dict(parse_setting(text) for text in changes))  # a wrong name is said before anything is made
    noise = Noise()
    with TemporaryDirectory() as folder:
        label, source = model, model
        if model.endswith(".json"):
            label, source = random_model(Path(model), Path(folder) / "float", layers=layers, vocab=vocab)
        job = {
            "source": source, "out": str(Path(folder) / "packed"), "recipe": recipe, "changes": list(changes),
            "calibration": calibration,
        }  # fmt: skip
        rows = []
        for found in _in_process(job):
            rows.append(found)
            progress("quantizing: blocks", found.get("done", 0), found.get("total", 1))
    about = {"model": label, "recipe": recipe, "settings": " ".join(changes), "calibration": calibration}
    return [{**about, **_shown(row), **noise.fields()} for row in rows]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("done", "total")}


def _in_process(job: dict[str, Any]) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quantize_cost", json.dumps(job)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ContenderError(f"quantizing {job['source']}: {lines[-1] if lines else 'no message'}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def quantize(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Quantize a folder and tell a row for each block as it is done, then one of the whole."""
    from bwla_compiler import api

    memory = PeakMemory()
    before = memory.fields()

    def on_block(block: BlockReport) -> None:
        row = {"block": block.name, "seconds": round(block.seconds, 2), "peak_mib": memory.fields()["recent_mib"]}
        tell({**row, "true_bits": round(block.true_bits, 4), "done": block.done, "total": block.total})
        memory.forget()

    report = api.quantize_to(
        job["source"],
        job["out"],
        recipe=job["recipe"],
        settings=dict(parse_setting(text) for text in job["changes"]),
        calibration=job["calibration"],
        on_block=on_block,
    )
    parts = {f"{name}_seconds": round(seconds, 2) for name, seconds in report.seconds.items()}
    whole = {"block": "all", "seconds": round(report.seconds["total"], 2), "peak_mib": memory.fields()["peak_mib"]}
    tell({**whole, "true_bits": round(report.bits.linears, 4), "before_mib": before["peak_mib"], **parts})


if __name__ == "__main__":
    quantize(json.loads(sys.argv[1]), lambda row: print(json.dumps(row), flush=True))

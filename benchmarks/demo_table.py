"""The main job as results: perplexities by recipe and activation bits, and its own decode speeds."""

from collections.abc import Callable
from typing import Any

from benchmarks.noise import Noise
from bwla_compiler.main_job import QUICK, Size, run_demo

Progress = Callable[[str, int, int], None]


def measure(progress: Progress, *, quick: bool = False) -> list[dict[str, Any]]:
    """Return a row per embedded model and recipe, "fp" among them, and a row per way of decoding."""
    noise, size = Noise(), QUICK if quick else Size()
    result = run_demo(html_path=None, quick=quick, progress=progress)
    texts = {name: getattr(size, name) for name in ("calibration_sequences", "test_sequences", "length")}
    return [{**row, **texts, **noise.fields()} for row in rows_of(result)]


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of what `run_demo` returned."""
    rows = []
    for model, found in result["models"].items():
        rows.append({"model": model, "recipe": "fp", **found["fp"]})
        rows += [{"model": model, "recipe": name, **figures} for name, figures in found["recipes"].items()]
    said = {"method": "", "spread": "", "machine": ""} | result["speed"]
    about = {"method": said.pop("method"), "rounds": said.pop("spread")}
    said.pop("machine")
    return rows + [{"way": way, "tokens_per_second": rate, **about} for way, rate in said.items()]

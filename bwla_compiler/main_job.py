"""The main job on the embedded models: plan, quantize, compare, time, and write the page."""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import StaticCache

from bwla_compiler import api
from bwla_compiler.backend import compile_backend
from bwla_compiler.codegen.isa import best_isa
from bwla_compiler.comparison import Texts, compare, saved_name
from bwla_compiler.demo import NAMES, demo_path
from bwla_compiler.inspection import inspect_module
from bwla_compiler.inspector.results import result_page
from bwla_compiler.runtime.modules import set_activation_bits
from bwla_compiler.workers import side_by_side

Progress = Callable[[str, int, int], None]

COMPARING = "comparing recipes on both models, percent"
SPEED_ROW, SPEED_BITS = "bwla", 6


@dataclass(frozen=True)
class Size:
    """How much text the demo calibrates and tests on, and how long it decodes."""

    calibration_sequences: int = 80
    test_sequences: int = 24
    length: int = 256
    decode_steps: int = 24
    rounds: int = 4


QUICK = Size(calibration_sequences=32, test_sequences=8, decode_steps=16, rounds=3)


def run_demo(
    *,
    json_path: str | Path | None = None,
    html_path: str | Path | None = "report.html",
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize both embedded models with every row's recipe, measure, and return the result as plain data.

    {"models": {NAME: {"fp": {"perplexity", "n_bytes"}, "recipes": {ROW: {"true_bits", "n_bytes", "a16", ...}}}},
    "speed": {WAY: tokens per second}, "seconds"}. Also written to json_path, and as a page to html_path. Trains the
    embedded model first where the cache has none (some minutes).
    """
    start = time.perf_counter()
    size = QUICK if quick else Size()
    tell = progress or (lambda label, done, total: None)
    for name in NAMES:
        demo_path(name, progress=tell)  # trained here, once, and not by two workers
    texts = Texts(size.calibration_sequences, size.test_sequences, size.length)
    with tempfile.TemporaryDirectory() as folder:
        job = partial(compare, texts=texts, folder=Path(folder))
        compared = dict(zip(NAMES, side_by_side(job, NAMES, label=COMPARING, progress=tell), strict=True))
        packed = api.load(Path(folder) / saved_name(NAMES[0], SPEED_ROW)).model
    result: dict[str, Any] = {"models": {name: found.figures for name, found in compared.items()}}
    result["speed"] = measure_speed(api.load(NAMES[0]).model, packed, size, tell)
    result["seconds"] = time.perf_counter() - start
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if html_path is not None:
        report = compared[NAMES[0]].report
        shown = inspect_module(packed, source=NAMES[0], outcome=report)
        Path(html_path).write_text(result_page(result, shown, subtitle=_machine()), "utf-8")
    return result


def _machine() -> str:
    return f"{platform.machine()}, kernels for {best_isa()}, torch {torch.__version__}, {platform.python_version()}"


def measure_speed(floats: nn.Module, packed: nn.Module, size: Size, progress: Progress) -> dict[str, Any]:
    """Return greedy decode speed, tokens per second at batch 1 with a static cache, way by way.

    Contenders decode in turn, round after round; the first round compiles and is not counted. Medians.
    """
    set_activation_bits(packed, SPEED_BITS)
    ways: dict[str, tuple[nn.Module, Callable[..., Any]]] = {
        "eager fp32": (floats, floats),
        "inductor fp32": (floats, torch.compile(floats, dynamic=False)),
        "bwla, eager": (packed, packed),
        "bwla": (packed, torch.compile(packed, backend=compile_backend, dynamic=False)),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for done in range(size.rounds):
        for i, (way, (model, decode)) in enumerate(ways.items()):
            progress(f"speed: {way}", done * len(ways) + i, size.rounds * len(ways))
            rates[way].append(_decode_rate(model, decode, steps=size.decode_steps))
    progress("speed", 1, 1)
    counted = {way: found[1:] for way, found in rates.items()}
    spread = ", ".join(f"{way} {min(r):.0f}-{max(r):.0f}" for way, r in counted.items())
    return {way: statistics.median(found) for way, found in counted.items()} | {
        "method": f"greedy decode, batch 1, {torch.get_num_threads()} threads, median of {size.rounds - 1}",
        "spread": spread,
        "machine": _machine(),
    }


def _decode_rate(model: nn.Module, decode: Callable[..., Any], *, steps: int, prompt: int = 8) -> float:
    """Return tokens per second of `decode` after an eager prompt; the cache is static, so one graph serves all."""
    cache = StaticCache(config=model.config, max_cache_len=prompt + steps)
    with torch.no_grad():
        out = model(input_ids=torch.arange(prompt)[None] + 5, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(steps):
            out = decode(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return steps / (time.perf_counter() - start)

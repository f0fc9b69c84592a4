"""The main job on the embedded models: plan, quantize, compare, time, and write the page."""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from bwla_compiler import api
from bwla_compiler.calibrate.report import QuantizeReport
from bwla_compiler.codegen.isa import best_isa
from bwla_compiler.demo import NAMES, demo_tokens
from bwla_compiler.evaluate.perplexity import perplexity
from bwla_compiler.inspector.report import build_report
from bwla_compiler.inspector.results import result_page
from bwla_compiler.runtime.modules import set_activation_bits

Progress = Callable[[str, int, int], None]

RECIPES: dict[str, str] = {"rtn": "rtn", "hadamard-rtn": "hadamard-rtn", "bwla": "bwla-w1a6"}
"""Rows of the table: the weights of each are fitted once, its activations set per column."""

ACTIVATION_BITS = (16, 8, 6, 4)


@dataclass(frozen=True)
class Size:
    """How much text the demo calibrates and tests on, and how long it decodes."""

    calibration_sequences: int = 128
    test_sequences: int = 48
    length: int = 256
    decode_steps: int = 48
    rounds: int = 6


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
    models, report = {}, None
    for name in NAMES:
        models[name], found = _compare(name, size, tell)
        report = report or found
    result: dict[str, Any] = {"models": models, "speed": measure_speed(size, tell)}
    result["seconds"] = time.perf_counter() - start
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if html_path is not None:
        assert report is not None
        shown = build_report(report.plan, source=NAMES[0], recipe=report.recipe.name, outcome=report)
        Path(html_path).write_text(result_page(result, shown, subtitle=_machine()), "utf-8")
    return result


def _machine() -> str:
    return f"{platform.machine()}, kernels for {best_isa()}, torch {torch.__version__}, {platform.python_version()}"


def _compare(name: str, size: Size, progress: Progress) -> tuple[dict[str, Any], QuantizeReport]:
    """Measure one embedded model, in floats and with every recipe."""
    model = api.load(name, progress=progress).model
    test = demo_tokens("test", sequences=size.test_sequences, length=size.length)
    calibration = demo_tokens("train", sequences=size.calibration_sequences, length=size.length - 1)
    fp = {"perplexity": perplexity(model, test, progress=_prefixed(progress, f"{name} fp ")), "n_bytes": _saved(model)}
    rows = {}
    for row, recipe in RECIPES.items():
        model = api.load(name).model
        tell = _prefixed(progress, f"{name} {row} ")
        report = api.quantize(model, recipe=recipe, calibration=calibration, progress=tell)
        row_result: dict[str, Any] = {"true_bits": report.bits.linears, "n_bytes": _saved(model)}
        rows[row] = row_result | _perplexities(model, test, tell)
    return {"fp": fp, "recipes": rows}, report


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda label, done, total: progress(prefix + label, done, total)


def _perplexities(model: nn.Module, tokens: Tensor, progress: Progress) -> dict[str, float]:
    found = {}
    for bits in ACTIVATION_BITS:
        set_activation_bits(model, bits)
        found[f"a{bits}"] = perplexity(model, tokens, progress=_prefixed(progress, f"A{bits} "))
    return found


def _saved(model: nn.Module) -> int:
    """Bytes of the weights' files as save_pretrained writes them."""
    with tempfile.TemporaryDirectory() as folder:
        api.save(model, folder)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))


def measure_speed(size: Size, progress: Progress) -> dict[str, Any]:
    """Return greedy decode speed on "demo:", tokens per second at batch 1 with a static cache, way by way.

    Contenders decode in turn, round after round; the first round compiles and is not counted. Medians.
    """
    floats, packed = api.load("demo:").model, api.load("demo:").model
    api.quantize(packed, recipe="bwla-w1a6", calibration="none")
    ways: dict[str, Callable[..., Any]] = {
        "eager fp32": floats,
        "inductor fp32": torch.compile(floats, dynamic=False),
        "bwla, eager": packed,
        "bwla, inductor": torch.compile(packed, dynamic=False),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for done in range(size.rounds):
        for i, (way, model) in enumerate(ways.items()):
            progress(f"speed: {way}", done * len(ways) + i, size.rounds * len(ways))
            rates[way].append(_decode_rate(model, floats.config, steps=size.decode_steps))
    progress("speed", 1, 1)
    counted = {way: found[1:] for way, found in rates.items()}
    spread = ", ".join(f"{way} {min(r):.0f}-{max(r):.0f}" for way, r in counted.items())
    return {way: statistics.median(found) for way, found in counted.items()} | {
        "method": f"greedy decode, batch 1, {torch.get_num_threads()} threads, median of {size.rounds - 1}",
        "spread": spread,
        "machine": _machine(),
    }


def _decode_rate(model: Callable[..., Any], config: Any, *, steps: int, prompt: int = 8) -> float:
    """Return tokens per second after a prompt, the cache of a fixed size so that one graph serves every step."""
    cache = StaticCache(config=config, max_cache_len=prompt + steps)
    with torch.no_grad():
        out = model(input_ids=torch.arange(prompt)[None] + 5, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(steps):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return steps / (time.perf_counter() - start)

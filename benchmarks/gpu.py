"""Kernels and models on a GPU in one script: `python benchmarks/gpu.py -o results`. No network, random weights.

Every kernel is first held against float64 on the device, then timed against what one would use instead, with weights
that rotate beyond the cache; then steps of models, float and packed, CUDA graphs on both sides. `--dry` runs the same
logic on a CPU with tiny sizes, in Triton's interpreter, and measures nothing.
"""

import argparse
import dataclasses
import html
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:  # both are read when Triton and the package are imported
    os.environ |= {"TRITON_INTERPRET": "1", "BWLA_KERNELS": "triton"}
if __package__ in (None, ""):
    # in place of this folder, whose `kernels` transformers would import for the package of that name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import gpu_models
from benchmarks.gpu_kernels import correctness, device_name, kernels
from benchmarks.gpu_sizes import DRY, FULL, Bench, say
from bwla_compiler.runtime import triton_tuner
from bwla_compiler.spec import FLOAT_BITS


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure what the arguments ask for, write results.json and results.svg, and return what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "-o", "--out", type=Path, default=None, help="folder of the results; nothing is written without"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--only", choices=("kernels", "models"), default=None)
    chosen = parser.parse_args(arguments)
    if not chosen.dry and not torch.cuda.is_available():
        parser.error("no GPU is here: run it on a machine with one, or with --dry")
    device = torch.device("cpu" if chosen.dry else "cuda")
    bench = Bench(DRY if chosen.dry else FULL, device, chosen.dry, time.monotonic())
    found: dict[str, Any] = {"machine": machine(bench), "dry": chosen.dry, "left_out": []}
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {}
    if chosen.only != "models":
        parts["correctness"] = lambda: correctness(bench)
    if chosen.only != "kernels":
        parts["models"] = lambda: models(bench, found["left_out"])
    if chosen.only != "models":
        parts["kernels"] = lambda: kernels(bench, found["left_out"])
    for part, rows in parts.items():
        found[part] = []
        for row in rows():
            found[part].append(row)
            save(found, bench, chosen.out)  # what was measured outlives what comes after it
    if chosen.out is not None:
        plot(found, chosen.out / "results.svg")
    return found


def save(found: dict[str, Any], bench: Bench, folder: Path | None) -> None:
    """Write results.json, with the tiles that were chosen until now; nothing without a folder."""
    found["tiles"] = {k: dataclasses.asdict(choice) for k, choice in triton_tuner.choices().items()}
    found["seconds"] = round(time.monotonic() - bench.started, 1)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(found, indent=1))


def machine(bench: Bench) -> dict[str, str]:
    """Return device, versions, commit and command."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "torchao", "gemlite")}
    here = {
        "device": device_name(bench),
        "python": platform.python_version(),
        "commit": git.stdout.strip() or "unknown",
    }
    return {**here, **versions, "cuda": str(torch.version.cuda), "command": " ".join(sys.argv)}


def _version(name: str) -> str:
    import importlib.metadata as metadata

    return metadata.version(name) if importlib.util.find_spec(name) else "-"


# ---------------------------------------------------------------- models


def models(bench: Bench, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """Yield seconds of steps of models, float and packed: decoding by batch, and a prompt."""
    size = bench.size
    for name, layers, batches, prompt in size.stacks:
        config = gpu_models.config_of(name, layers=layers)
        for way, make in (("bf16", gpu_models.float_model), ("bwla", gpu_models.packed_model)):
            title = f"{name}, {layers or 'all'} layers, {way}"
            if bench.late_for_models:
                left_out.append(title)
                continue
            say(title)
            if not bench.dry:
                torch.cuda.reset_peak_memory_stats()
            model: Any = None
            try:
                model = make(config, bench.device)
                about = {"model": name, "layers": config.num_hidden_layers, "way": way}
                yield from _steps(bench, model, about, left_out, (*batches, *((0,) if prompt else ())), prompt)
            except torch.cuda.OutOfMemoryError as error:
                left_out.append(f"{title}: {error}"[:300])
            model = None  # the next one needs its memory
            torch.compiler.reset()
            if not bench.dry:
                torch.cuda.empty_cache()


def _steps(
    bench: Bench, model: Any, about: dict[str, Any], left_out: list[str], batches: Sequence[int], prompt: int
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model; a batch of 0 stands for the prompt."""
    size, way = bench.size, about["way"]
    for batch in batches:
        if bench.late_for_models:
            left_out.append(f"{about}, batch {batch}")
        elif batch:
            yield _decode(bench, model, about, batch=batch, cache_bits=FLOAT_BITS)
            if way == "bwla" and batch == max(batches):  # where the cache weighs most
                torch.compiler.reset()
                yield _decode(bench, model, about, batch=batch, cache_bits=8)
        else:
            found = gpu_models.time_prefill(model, way, tokens=prompt, rounds=max(3, size.rounds // 4), dry=bench.dry)
            yield {**about, "step": "prefill", "batch": 1, **_rates(found, prompt, bench)}
        torch.compiler.reset()


def _decode(bench: Bench, model: Any, about: dict[str, Any], *, batch: int, cache_bits: int) -> dict[str, Any]:
    """Return the row of steps of one token a sequence, over a cache of floats or of int8."""
    size, way = bench.size, about["way"]
    found = gpu_models.time_decode(
        model, way, batch=batch, context=size.context, rounds=size.rounds, dry=bench.dry, cache_bits=cache_bits
    )
    way = way if cache_bits == FLOAT_BITS else f"{way}, int8 cache"
    return {**about, "way": way, "step": "decode", "batch": batch, **_rates(found, batch, bench)}


def _rates(steps: gpu_models.Steps, tokens: int, bench: Bench) -> dict[str, float]:
    peak = 0 if bench.dry else torch.cuda.max_memory_allocated()
    own = dataclasses.asdict(steps)
    return {**own, "tokens_per_second": tokens / steps.seconds, "peak_memory_bytes": peak}


# ---------------------------------------------------------------- the plot


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw how many times faster than bf16 steps are, as an SVG of bars; nothing where no model was measured twice."""
    rows = {(m["model"], m["layers"], m["step"], m["batch"], m["way"]): m["seconds"] for m in found.get("models", ())}
    bars = [
        (f"{model}, {layers} layers, {step}, batch {batch}{way.removeprefix('bwla')}", other / seconds)
        for (model, layers, step, batch, way), seconds in rows.items()
        if way != "bf16" and (other := rows.get((model, layers, step, batch, "bf16")))
    ]
    if bars:
        device = f"{found['machine']['device']}{' (dry run)' if found['dry'] else ''}"
        path.write_text(bars_svg(bars, f"Times faster than bf16, {device}"), "utf-8")


def bars_svg(bars: Sequence[tuple[str, float]], title: str) -> str:
    """Return an SVG of horizontal bars, a line at 1; drawn here, since a GPU machine may have no library for it."""
    unit = 300 / max(1.0, *(value for _, value in bars))
    height = 22 * len(bars) + 50
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" font-family="sans-serif"']
    lines += [f' font-size="12"><rect width="760" height="{height}" fill="white"/>']
    lines += [f'<text x="10" y="20" font-weight="bold">{html.escape(title)}</text>']
    for i, (label, value) in enumerate(bars):
        y = 35 + 22 * i
        lines += [f'<text x="370" y="{y + 13}" text-anchor="end">{html.escape(label)}</text>']
        lines += [f'<rect x="380" y="{y}" width="{value * unit:.1f}" height="17" fill="#4477aa"/>']
        lines += [f'<text x="{384 + value * unit:.1f}" y="{y + 13}">{value:.2f}</text>']
    lines += [f'<path d="M{380 + unit:.1f} 30V{height - 12}" stroke="black"/></svg>']
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(json.dumps(main()["machine"], indent=1))

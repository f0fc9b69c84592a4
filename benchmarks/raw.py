"""Perplexity of raw models under torch.compile(model, backend="bwla"), by where the calibration comes from."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn.functional import cross_entropy

from bwla_compiler.backend import compile_backend
from bwla_compiler.demo import demo_tokens, load_demo
from bwla_compiler.demo.model import NAMES

Progress = Callable[[str, int, int], None]

WAYS = (("bwla-w1a6", "self"), ("bwla-w1a6", "none"), ("hadamard-rtn", "none"))
"""Recipe and calibration."""
SEQUENCES, LENGTH, BATCH = 96, 256, 8
QUICK_SEQUENCES, QUICK_CALIBRATION = 48, 64
"""Of a short run: test sequences, and at most so many for calibration."""


def measure(progress: Progress, *, quick: bool, outliers: bool, ways: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return a row per embedded model and way; nothing is tuned, as nothing is where a raw model is compiled.

    quick: the graphs run as they are, without Inductor's code (to 1e-5 the same), on less text, with less to calibrate
    on. outliers: of that model alone. ways: rows by name, none for all. Raises ValueError for a name that no row has.
    """
    named = {f"{recipe}, calibration {calibration}": (recipe, calibration) for recipe, calibration in WAYS}
    if unknown := set(ways) - named.keys():
        raise ValueError(f"no row is called {', '.join(sorted(unknown))}; there are {'; '.join(named)}")
    chosen = [named[way] for way in ways] or WAYS
    jobs = [(name, *way) for name in NAMES for way in chosen if name == "demo:outliers" or not outliers]
    rows = []
    for done, (name, recipe, calibration) in enumerate(jobs):
        progress(f"raw, {name} {recipe}, calibration {calibration}", done, len(jobs))
        rows.append(_row(name, recipe, calibration, quick=quick))
    progress("raw", len(jobs), len(jobs))
    return rows


def _row(name: str, recipe: str, calibration: str, *, quick: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    model = load_demo(name).model
    rows = demo_tokens("test", sequences=QUICK_SEQUENCES if quick else SEQUENCES, length=LENGTH)
    fp = _perplexity(model, rows)
    backend = partial(compile_backend, hand_over=_as_it_is) if quick else compile_backend
    options: dict[str, Any] = {"recipe": recipe, "calibration": calibration, "activation_bits": 6}
    if quick:
        options["calibration.sequences"] = QUICK_CALIBRATION
    start = time.perf_counter()
    fast = torch.compile(model, backend=backend, options=options, fullgraph=True)
    found = _perplexity(fast, rows)
    return {
        "model": name.strip(":").replace(":", "-"),
        "way": f"{recipe}, calibration {calibration}",
        "inductor": not quick,
        "test_sequences": len(rows),
        "fp_perplexity": round(fp, 3),
        "perplexity": round(found, 3),
        "a6": round(found / fp, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _perplexity(model: Callable[..., Any], rows: torch.Tensor) -> float:
    total = 0.0
    with torch.no_grad():
        for batch in rows.split(BATCH):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
            total += float(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return float(torch.tensor(total / rows[:, 1:].numel(), dtype=torch.float64).exp())


def _as_it_is(gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None) -> Callable[..., Any]:
    return gm.forward

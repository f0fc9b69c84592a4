"""`export --to gguf` held to llama.cpp: perplexity of one packed model there and here, on the same windows of ids.

llama.cpp rounds activations to 8 bits (32 channels a scale), the head's too, and keeps its cache in float16; nothing of
it can be turned off. Ours is read with activations in floats, as recipe bwla-folded has them, and with 8 bits a token.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.errors import ResultsError
from benchmarks.llama import PACKAGE, Llama, LlamaModule
from benchmarks.noise import pinned
from benchmarks.quality_folder import streams
from benchmarks.subject import QUICK_FIT
from bwla_compiler import api
from bwla_compiler.demo import demo_tokens, is_demo
from bwla_compiler.runtime.modules import PackedLinear, set_activation_bits
from bwla_compiler.tokens import from_ids

Progress = Callable[[str, int, int], None]
Row = dict[str, Any]

RECIPE = "bwla-folded"
NEAR = 0.01
"""By how much perplexities may differ, relative to ours with activations in floats."""

CALIBRATION = 80
"""Sequences, as the main job has them."""


def measure(
    progress: Progress,
    *,
    model: str = "demo:",
    tokens: Path | None = None,
    sequences: int = 24,
    length: int = 256,
    quick: bool = False,
    threads: int = 1,
) -> list[Row]:
    """Return a row per way: the float model (where it is given), ours at 16 and 8 bits, and llama.cpp.

    model: demo:, or a folder, of floats (then quantized by bwla-folded) or packed. tokens: text of a folder, whose last
    tenth is held out; see `quality_folder.streams`. quick: a fit cut short. Raises ResultsError where llama.cpp or the
    text is missing, CheckpointError where GGUF cannot hold the model.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ResultsError(f"{PACKAGE} is not installed: pip install 'bwla-compiler[peers]'")
    calibration, windows = _texts(model, tokens, sequences, length)
    loaded = api.load(model, progress=progress)
    rows: list[Row] = []
    with pinned(threads), TemporaryDirectory() as folder:
        if not any(isinstance(module, PackedLinear) for module in loaded.model.modules()):
            rows.append({"way": "float", "perplexity": api.perplexity(loaded.model, windows, progress=progress)})
            api.quantize(
                loaded.model, recipe=RECIPE, settings=QUICK_FIT if quick else None, calibration=calibration,
                progress=progress,
            )  # fmt: skip
        api.export(loaded.model, folder, to="gguf", tokenizer=loaded.tokenizer)
        rows += compared(loaded.model, Path(folder) / "model.gguf", windows, threads=threads, progress=progress)
    label = model if is_demo(model) else Path(model).resolve().name
    about = {"model": label, "recipe": _recipe(loaded.model, quick), "sequences": len(windows), "length": length}
    return [{**about, **row, "perplexity": round(row["perplexity"], 4)} for row in rows]


def compared(model: Any, file: Path, windows: Tensor, *, threads: int, progress: Progress) -> list[Row]:
    """Return rows of a packed model and of its GGUF file on windows [n, length + 1] of ids.

    against_a16, against_a8: a perplexity over ours with activations in floats, and of 8 bits. kl, top1: of llama.cpp
    against ours in floats. agrees: whether it is within NEAR of ours in floats.
    """
    ours: dict[int, float] = {}
    for bits in (8, 16):
        set_activation_bits(model, bits)
        ours[bits] = api.perplexity(model, windows, progress=progress)
    llama = Llama(file, length=windows.shape[1] - 1, threads=threads)
    try:
        there = LlamaModule(llama)
        perplexity = api.perplexity(there, windows, progress=progress)
        near = api.fidelity(model, there, windows, progress=progress)
    finally:
        llama.close()
    rows: list[Row] = [{"way": f"ours, A{bits}", "perplexity": ours[bits]} for bits in (16, 8)]
    rows.append({"way": "llama.cpp", "perplexity": perplexity, "version": llama.about, "n_bytes": llama.n_bytes})
    for row in rows:
        row |= {f"against_a{bits}": round(row["perplexity"] / ours[bits], 5) for bits in (16, 8)}
    rows[-1] |= {"kl": float(f"{near.kl:.2e}"), "top1": round(near.top1_agreement, 4)}
    rows[-1]["agrees"] = abs(perplexity / ours[16] - 1) <= NEAR
    return rows


def _texts(model: str, tokens: Path | None, sequences: int, length: int) -> tuple[Tensor, Tensor]:
    """Return calibration [n, length] and held-out windows [at most `sequences`, length + 1], int64 ids."""
    if is_demo(model):
        train = demo_tokens("train", sequences=CALIBRATION, length=length - 1)
        return train, demo_tokens("test", sequences=sequences, length=length)
    found = streams(tokens or Path(model) / "tokens.safetensors", Path(model))
    starts = torch.randint(
        0, found["train"].numel() - length, (CALIBRATION, 1), generator=torch.Generator().manual_seed(0)
    )
    return found["train"][starts + torch.arange(length)], from_ids(found["test"], length=length + 1, limit=sequences)


def _recipe(model: Any, quick: bool) -> str:
    name = str(model.config.quantization_config.recipe.get("name", ""))
    return f"{name}, fit cut short" if quick else name

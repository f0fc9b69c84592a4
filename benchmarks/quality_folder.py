"""A subject of the quality table from any model folder and any file of tokens or text."""

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from benchmarks.quality_model import FACTS, LENGTH, TOKENS, WINDOWS_A_FILE, Subject, floats
from bwla_compiler.errors import ModelError
from bwla_compiler.tokens import from_file

HELD_OUT = 0.1
"""Share of a stream, at its end, that is read for perplexity where the file does not say."""


def from_folder(folder: Path, tokens: Path | None, *, files: int) -> Subject:
    """Return the causal LM of a folder with its text.

    tokens: a `.safetensors` with streams of ids "train" and "test" and, where there is text of another kind, "ood"; or
    anything that `tokens.from_file` reads, whose last tenth is held out. None: the folder's own tokens.safetensors.
    Files end where the model's end-of-text token stands; where it hardly does, each few windows count as a file.
    Raises ModelError where the folder holds no model or its own tokens are not held out, CalibrationError, and
    ValueError where the model reads fewer tokens than a window has.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: holds no model, or none that `bench train` has finished; give another") from error
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and most < LENGTH:
        raise ValueError(f"{folder}: reads {most} tokens at most; the windows of this benchmark have {LENGTH}")
    found = streams(tokens, folder) if tokens else _own_streams(folder)
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    windows, owners = windows_of(found["test"], end=end, files=files)
    nothing = torch.zeros(0, LENGTH + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    ood = windows_of(found["ood"], end=end, files=files) if "ood" in found else nothing
    name, trained = folder.resolve().name, _trained_tokens(folder)
    return Subject(name, lambda: floats(folder), found["train"], windows, owners, *ood, trained_tokens=trained)


def _trained_tokens(folder: Path) -> int | None:
    """Return how many tokens the model of a folder was trained on; None where the folder does not tell."""
    path = folder / FACTS
    return json.loads(path.read_text("utf-8"))["n_tokens"] if path.is_file() else None


def _own_streams(folder: Path) -> dict[str, Tensor]:
    """Return the streams of a folder's own tokens.safetensors; what the model was trained on is not cut for a test."""
    path = folder / TOKENS
    if not path.is_file() or "test" not in load_file(path):
        raise ModelError(f"{folder}: no {TOKENS} with a stream that was held out is there; give --tokens FILE")
    return streams(path, folder)


def streams(path: Path, folder: Path) -> dict[str, Tensor]:
    """Return the streams [n_tokens] int64 "train", "test" and perhaps "ood" of a file; folder: has the tokenizer."""
    stored = load_file(path) if path.suffix == ".safetensors" else {}
    if {"train", "test"} <= stored.keys():
        return {name: stream.flatten().to(torch.int64) for name, stream in stored.items()}
    ids = path.suffix in (".pt", ".npy", ".safetensors")
    tokenizer = None if ids else AutoTokenizer.from_pretrained(folder)
    stream = from_file(path, tokenizer, length=LENGTH).flatten()
    cut = stream.numel() - int(HELD_OUT * stream.numel())
    return {"train": stream[:cut], "test": stream[cut:]}


def windows_of(stream: Tensor, *, end: int | None, files: int) -> tuple[Tensor, Tensor]:
    """Return windows [n, LENGTH + 1] of at most so many files, evenly spaced in each, and their files' numbers [n]."""
    ends = (stream == end).nonzero().flatten().tolist() if end is not None else []
    edges = [0, *(place + 1 for place in ends), stream.numel()]
    parts = [stream[low:high] for low, high in itertools.pairwise(edges) if high - low > LENGTH]
    if len(parts) < files:
        parts = [part for part in stream.split(WINDOWS_A_FILE * LENGTH + 1) if part.numel() > LENGTH]
    if not parts:
        raise ValueError(
            f"{stream.numel()} held-out tokens hold no window of {LENGTH} and the next one; give more text"
        )
    found = parts[:: max(1, len(parts) // files)][:files]
    cut = [part.unfold(0, LENGTH + 1, LENGTH) for part in found]
    kept = [
        rows[torch.arange(min(len(rows), WINDOWS_A_FILE)) * len(rows) // min(len(rows), WINDOWS_A_FILE)] for rows in cut
    ]
    owners = [torch.full((len(rows),), number) for number, rows in enumerate(kept)]
    return torch.cat(kept), torch.cat(owners)

"""Save a model so that nothing half-written is left, and a packed one only where it reads back equal."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bwla_compiler.checkpoint.files import writing
from bwla_compiler.errors import CheckpointError
from bwla_compiler.runtime.skeleton import packed_modules
from bwla_compiler.tokens import device_of, evaluating, random_tokens, vocabulary

PROBE = (2, 8)
"""Sequences and tokens that the saved model and the one in memory are compared on."""


def save_checked(model: Any, path: Path, *, tokenizer: Any = None) -> None:
    """Write a model with its tokenizer into a folder beside `path`, read a packed one again, then give it its name.

    Files of the same names that `path` holds are replaced. Raises CheckpointError where it cannot be written, or where
    a tensor or a logit differs after reading: then nothing is kept.
    """
    beside = path.with_name(f".{path.name}.saving")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with writing(path):
            beside.mkdir(parents=True)
            model.save_pretrained(beside)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
        if packed_modules(model):
            _compare(model, beside)
        with writing(path):
            _name(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _name(beside: Path, path: Path) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        os.replace(beside, path)
        return
    for file in sorted(beside.iterdir(), key=lambda f: f.name == "config.json"):  # what makes it a model comes last
        os.replace(file, path / file.name)


def _compare(model: Any, folder: Path) -> None:
    """Raise CheckpointError where a model reads back as another."""
    again = type(model).from_pretrained(folder, dtype=model.dtype).eval().to(device_of(model))
    mine, theirs = model.state_dict(), again.state_dict()
    wrong = [n for n in (*mine, *theirs) if n not in mine or n not in theirs or not torch.equal(mine[n], theirs[n])]
    if wrong:
        raise CheckpointError(f"{wrong[0]} reads back as another: this model cannot be saved; please report it")
    ids = random_tokens(vocabulary(model), sequences=PROBE[0], length=PROBE[1], seed=0).to(device_of(model))
    if not torch.equal(_logits(model, ids), _logits(again, ids)):
        raise CheckpointError(
            f"{type(model).__name__} answers otherwise when it is read again, though all tensors are equal: "
            "it was not saved; please report it"
        )


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with evaluating(model):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.nan_to_num()  # a model may give NaN; NaN equals nothing

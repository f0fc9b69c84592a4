"""Tiny packed models: each is captured and quantized once in a process, and every test gets a copy of its own."""

import copy
from functools import cache
from typing import Any

import torch
from torch import nn

from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.passes.shared_functions import share_functions
from bwla_compiler.recipe import load_recipe
from tests import tiny


def packed(
    name: str,
    recipe: str = "hadamard-rtn",
    *,
    layers: int = 2,
    tokens: tuple[int, int] | None = None,
    **settings: Any,
) -> nn.Module:
    """Return the model of `tiny.make`, quantized.

    tokens: [sequences, length] of random ones to calibrate on, by default none. settings: as for `load_recipe`.
    """
    return copy.deepcopy(_made(name, recipe, layers, tokens, tuple(sorted(settings.items()))))


def calibrated_qwen3(**settings: Any) -> nn.Module:
    """Return a Qwen3 of one block with all that a linear may have: a pair, fitted rotations; settings besides."""
    chosen = {"psp.rank": 2, "psp.hidden_over": 32, "transform.kind": "okt", "tuning.steps": 0}
    return packed("qwen3", "bwla-w1a6", layers=1, tokens=(4, 16), **(chosen | settings))


@cache
def _made(
    name: str,
    recipe: str,
    layers: int,
    tokens: tuple[int, int] | None,
    settings: tuple[tuple[str, Any], ...],
) -> nn.Module:
    model = tiny.make(name, layers=layers)
    ids = None if tokens is None else torch.randint(0, 64, tokens, generator=torch.Generator().manual_seed(0))
    quantize_model(model, load_recipe(recipe, dict(settings)), ids)
    share_functions(model)
    return model

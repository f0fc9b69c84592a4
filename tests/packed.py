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
    dtype: torch.dtype = torch.float32,
    tokens: tuple[int, int] | None = None,
    **settings: Any,
) -> nn.Module:
    """Return the model of `tiny.make`, quantized.

    tokens: [sequences, length] of random ones to calibrate on, by default none. settings: as for `load_recipe`.
    """
    return copy.deepcopy(_made(name, recipe, layers, dtype, tokens, tuple(sorted(settings.items()))))


@cache
def _made(
    name: str,
    recipe: str,
    layers: int,
    dtype: torch.dtype,
    tokens: tuple[int, int] | None,
    settings: tuple[tuple[str, Any], ...],
) -> nn.Module:
    model = tiny.make(name, layers=layers, dtype=dtype)
    ids = None if tokens is None else torch.randint(0, 64, tokens, generator=torch.Generator().manual_seed(0))
    quantize_model(model, load_recipe(recipe, dict(settings)), ids)
    share_functions(model)
    return model

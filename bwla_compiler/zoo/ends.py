"""Whether quantizing keeps what a model computes: its ends rounded to int8, everything folded, nothing else rounded.

One-bit linears of random weights leave nothing of the logits to compare; int8 ends move them by about a hundredth, and
an end whose module did more than its codes do, by all.
"""

import copy

import torch
from torch import Tensor, nn

from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.graph.plan import Plan
from bwla_compiler.passes.quantize_ends import head_names
from bwla_compiler.recipe import load_recipe
from bwla_compiler.zoo.compiled import call_of, distance, inputs, logits

NOISE = 0.01
"""Of a matrix' entries, relative to their spread: what rounding a Gaussian row to int8 leaves."""

MOST = 4.0
"""How often as far as by noise rounded ends may move the logits; they were 1.6 times as far at most."""


def ends_error(model: nn.Module, plan: Plan, *, seed: int = 0) -> str:
    """Return what is wrong with a model whose ends alone are int8, "" for nothing. plan: of the model."""
    heads = head_names(model, plan)
    keep = [{"pattern": x.name, "keep": True} for x in plan.linears if x.name not in heads]
    rounded = copy.deepcopy(model)
    quantize_model(rounded, load_recipe("hadamard-rtn", {"overrides": keep}), None, plan=plan, seed=seed)
    expected = _logits(model, seed)
    by_ends = distance(_logits(rounded, seed), expected)
    by_noise = distance(_logits(_shaken(model, seed), seed), expected)
    if by_ends <= MOST * by_noise:
        return ""
    return f"int8 ends move the logits by {by_ends:.1e} of their norm, noise of their size by {by_noise:.1e}"


def _logits(model: nn.Module, seed: int) -> Tensor:
    with torch.no_grad():
        return logits(model, next(inputs(model, seed)), call_of(model, seed))


def _shaken(model: nn.Module, seed: int) -> nn.Module:
    shaken, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shaken.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(noise * parameter.std() * NOISE)
    return shaken

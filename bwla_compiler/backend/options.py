"""Options of torch.compile(model, backend="bwla", options={...}): one set of names with recipes and the CLI."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bwla_compiler.errors import RecipeError
from bwla_compiler.recipe import Recipe, load_recipe
from bwla_compiler.settings import settings
from bwla_compiler.spec import FLOAT_BITS

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DEFAULT_RECIPE = "bwla-w1a6"


@dataclass(frozen=True)
class Options:
    """What the user asked for, checked.

    recipe: of raw models. calibration: "self" (the model generates it), "random", "none", or token ids
    [sequences, length] int64. seed: of everything random. free_weights: release the float weights once packed ones
    serve. verify: compare each graph's first results with the quantized model's, run eagerly. cache: keep packed
    weights on disk. mode: Inductor's, None for its default.
    """

    recipe: Recipe
    calibration: str | Tensor = "self"
    seed: int = 0
    free_weights: bool = False
    verify: bool = False
    cache: bool = True
    mode: str | None = None


_OWN = [f.name for f in dataclasses.fields(Options) if f.name != "mode"]


def read_options(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """Return the options that torch.compile passed on. Raises RecipeError, naming the option and the remedy.

    Beside the fields of `Options`: activation_bits, and a recipe's fields by their dotted names ("psp.hidden_over").
    A recipe's tuning is left out here unless "tuning.steps" is given: tune offline, with `bwla.quantize`.
    """
    if mode is not None and mode not in MODES:
        raise RecipeError(f"mode {mode!r} is not known; Inductor's modes: {', '.join(MODES)}")
    given = dict(options or {})
    changes = {key: given.pop(key) for key in list(given) if "." in key}
    if "activation_bits" in given:
        changes["activations.bits"] = given.pop("activation_bits")
    recipe = _untuned(load_recipe(given.pop("recipe", DEFAULT_RECIPE), changes), changes)
    if recipe.simulated:
        raise RecipeError(
            f"recipe {recipe.name}: no packed format holds its weights, so there is nothing to compile; "
            "quantize with it to measure it, or compile with a bwla recipe"
        )
    if recipe.cache.bits < FLOAT_BITS:
        raise RecipeError(
            f"cache.bits = {recipe.cache.bits}: torch.compile makes no cache, so it cannot choose its bits; call "
            "bwla_compiler.api.set_cache_bits(model, 8) for generate, or hand the model an int8_cache"
        )
    for key, value in given.items():
        _check(key, value)
    return Options(recipe=recipe, mode=mode, **{"verify": settings().verify, **given})


def _untuned(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe without tuning unless the user asked for it here: the first call waits for the fit."""
    if "tuning.steps" in changes or recipe.tuning.steps == 0:
        return recipe
    return dataclasses.replace(recipe, tuning=dataclasses.replace(recipe.tuning, steps=0))


def _check(key: str, value: Any) -> None:
    if key not in _OWN:
        near = difflib.get_close_matches(key, [*_OWN, "activation_bits"], n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"backend option {key!r} is not known{meant} Options: {', '.join([*_OWN, 'activation_bits'])}, and a "
            'recipe\'s fields by their dotted names, such as "psp.hidden_over"'
        )
    if key == "calibration":
        _check_calibration(value)
    elif key == "seed":
        if type(value) is not int:
            raise RecipeError(f"option seed is {value!r}: give an integer")
    elif type(value) is not bool:
        raise RecipeError(f"option {key} is {value!r}: give True or False")


def _check_calibration(value: Any) -> None:
    known = '"self", "random", "none" or token ids [sequences, length] int64'
    if isinstance(value, Tensor):
        if value.ndim != 2 or value.numel() == 0 or value.dtype != torch.int64:
            raise RecipeError(
                f"option calibration is a tensor of shape {list(value.shape)}, {value.dtype}: give {known}"
            )
    elif value not in ("self", "random", "none"):
        raise RecipeError(f"option calibration is {value!r}: give {known}")

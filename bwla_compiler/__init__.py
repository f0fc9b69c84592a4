"""A compiler to 1-bit weights and low-bit activations. Names are loaded when they are first used."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bwla_compiler.api import (
        bits,
        generate,
        load,
        perplexity,
        plan,
        quantize,
        quantize_to,
        rotate,
        save,
        verify,
    )
    from bwla_compiler.backend import refresh
    from bwla_compiler.errors import BwlaError
    from bwla_compiler.graph.plan import Plan
    from bwla_compiler.inspection import inspect
    from bwla_compiler.main_job import run_demo
    from bwla_compiler.recipe import Recipe, builtin_recipes, load_recipe

# Where each public name lives; importing the package itself must not import torch.
_HOMES = {
    "BwlaError": "bwla_compiler.errors",
    "Plan": "bwla_compiler.graph.plan",
    "Recipe": "bwla_compiler.recipe",
    "bits": "bwla_compiler.api",
    "builtin_recipes": "bwla_compiler.recipe",
    "generate": "bwla_compiler.api",
    "inspect": "bwla_compiler.inspection",
    "load": "bwla_compiler.api",
    "load_recipe": "bwla_compiler.recipe",
    "perplexity": "bwla_compiler.api",
    "plan": "bwla_compiler.api",
    "quantize": "bwla_compiler.api",
    "quantize_to": "bwla_compiler.api",
    "refresh": "bwla_compiler.backend",
    "rotate": "bwla_compiler.api",
    "run_demo": "bwla_compiler.main_job",
    "save": "bwla_compiler.api",
    "verify": "bwla_compiler.api",
}

__all__ = [
    "BwlaError",
    "Plan",
    "Recipe",
    "bits",
    "builtin_recipes",
    "generate",
    "inspect",
    "load",
    "load_recipe",
    "perplexity",
    "plan",
    "quantize",
    "quantize_to",
    "refresh",
    "rotate",
    "run_demo",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

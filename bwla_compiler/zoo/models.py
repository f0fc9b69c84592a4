"""A tiny random model of any architecture that transformers knows as a causal LM."""

from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bwla_compiler.errors import ModelError
from bwla_compiler.zoo.values import values_of

MAX_PARAMETERS = 5_000_000


def architectures() -> tuple[str, ...]:
    """Return the model_type of every entry of AutoModelForCausalLM's mapping, in its order."""
    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def known(names: Sequence[str]) -> tuple[str, ...]:
    """Return names once each, or all architectures where none is given; ModelError where one is unknown."""
    everything = architectures()
    for name in names:
        if name not in everything:
            close = get_close_matches(name, everything)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ModelError(f"{name}: no causal LM of the installed transformers has this model_type{hint}")
    return tuple(dict.fromkeys(names)) or everything


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a tiny model of an architecture with random weights, in eval mode.

    Vectors (norms, biases) are random so that folding them is exercised; matrices are tripled so that attention
    and activations are far from linear. Raises ModelError where the architecture is unknown, or its sizes are not
    the config's alone to choose (more than MAX_PARAMETERS parameters).
    """
    known([name])
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        with torch.device("meta"):  # counts what the real thing would take before taking it
            count = sum(p.numel() for p in _build(name, dtype).parameters())
        if count > MAX_PARAMETERS:
            raise ModelError(f"{name}: {count} parameters with the zoo's values; add smaller ones for this family")
        model = _build(name, dtype).eval()
    _randomize(model, torch.Generator().manual_seed(seed + 1))
    return model.requires_grad_(False)


def _build(name: str, dtype: torch.dtype) -> nn.Module:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**values_of(name)), dtype=dtype)
    assert isinstance(model, nn.Module)
    return model


def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
            else:
                parameter.mul_(3)

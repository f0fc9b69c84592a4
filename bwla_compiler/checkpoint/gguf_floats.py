"""What a model holds in floats as GGUF takes it: gains and biases as F32, matrices in a type that the caller makes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bwla_compiler.checkpoint.gguf_family import Family, rotary_factors
from bwla_compiler.checkpoint.gguf_file import Tensors
from bwla_compiler.errors import CheckpointError

Matrix = Callable[[str, Tensor], tuple[Any, str | None]]
"""(name there, weight [out, in]) -> values and ggml type."""


def halves(name: str, weight: Tensor) -> tuple[Any, str | None]:
    """Return a matrix as float16."""
    return weight.to(torch.float16).cpu().contiguous().numpy(), None


def float_tensors(model: Any, family: Family, *, matrix: Matrix) -> Tensors:
    """Return all tensors of a float model. Raises CheckpointError for what has no place, and what `matrix` raises."""
    found: Tensors = {}
    for name, module in model.named_modules():
        add_floats(found, name, module, family=family, model=model, matrix=matrix)
    add_factors(found, model, family)
    return found


def add_floats(
    found: Tensors, name: str, module: nn.Module, *, family: Family, model: Any, matrix: Matrix = halves
) -> None:
    """Add what a module holds itself in floats; a head that is the embedding's own weight is left out there."""
    own: Mapping[str, Tensor] = {n: p.detach() for n, p in module._parameters.items() if p is not None}
    if not own:
        return
    there = family.name(name)
    if name == "lm_head" and own["weight"].data_ptr() == model.get_input_embeddings().weight.data_ptr():
        return
    order = family.row_order(there.rpartition(".")[2], own["weight"].shape[0], model.config)
    values = {leaf: value if order is None else value[order] for leaf, value in own.items()}
    if values["weight"].ndim == 2:
        found[f"{there}.weight"] = matrix(there, values["weight"])
    else:
        found[f"{there}.weight"] = (values["weight"].float().cpu().contiguous().numpy(), None)
    if "bias" in values:
        add_bias(found, there, values["bias"], family=family, name=name)


def add_bias(found: Tensors, there: str, bias: Tensor, *, family: Family, name: str) -> None:
    """Add a bias [out]. name: the module's, for the CheckpointError where the family has no place for it."""
    if there.rpartition(".")[2] not in family.biases:
        raise CheckpointError(f"{name}: has a bias, for which GGUF's {family.architecture} has no place")
    found[f"{there}.bias"] = (bias.float().cpu().numpy(), None)


def add_factors(found: Tensors, model: Any, family: Family) -> None:
    """Add the factors of the rotary frequencies where there are any; raises CheckpointError as rotary_factors does."""
    factors = rotary_factors(model, family)
    if factors is not None:
        found["rope_freqs.weight"] = (factors.numpy(), None)

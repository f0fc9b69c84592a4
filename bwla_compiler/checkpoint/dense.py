"""Export as an ordinary float16 checkpoint: the rotated, dequantized model, which any reader of its family takes.

What cannot be told by float weights is left out or refused: activations are not rounded, and a change of basis that is
computed at run time has no place in the family's code.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bwla_compiler.checkpoint.saving import save_checked
from bwla_compiler.errors import CheckpointError
from bwla_compiler.numerics.kronecker import apply_kronecker
from bwla_compiler.runtime.halves import read_half
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, PackedExperts, PackedLinear, TiedHead
from bwla_compiler.runtime.online import OnlineTransform
from bwla_compiler.runtime.skeleton import packed_modules

MARK = "bwla_dense_export"
"""Key of config.json that says what the weights are."""


def export_dense(model: Any, path: Path, *, tokenizer: Any = None) -> None:
    """Write a packed model as float16 weights of its family into a folder. The model itself is not changed.

    An online transform is multiplied into the weight behind it, W T^T, so that the weight acts on the input as it
    comes. Raises CheckpointError for experts, for models that are not packed, and where a fold has added a bias that
    the family has no place for.
    """
    packed = packed_modules(model)
    if not packed:
        raise CheckpointError(f"{type(model).__name__} is not packed: save it as it is")
    experts = next((name for name, m in packed.items() if isinstance(m, PackedExperts)), "")
    if experts:
        raise CheckpointError(f"{experts}: packed experts have no dense export; export a model without experts")
    config = _float_config(model)
    with torch.device("meta"):
        family = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    family.generation_config = model.generation_config
    state = _float_state(model, packed)
    for name, tensor in family.state_dict().items():
        found = state.pop(name, None)
        if found is not None and type(family.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D":
            found = found.T if found.ndim == 2 and name.rpartition(".")[0] in packed else found
        if found is None or found.shape != tensor.shape:
            raise CheckpointError(f"{name}: the packed model has no such weight, so it cannot be told in floats")
        _put(family, name, found.to(torch.float16).contiguous())
    if state:
        raise CheckpointError(
            f"{next(iter(state))}: a fold has put it there, and {type(model).__name__} has no place for it; use "
            "transform.kind = none"
        )
    save_checked(family, path, tokenizer=tokenizer)


def _float_config(model: Any) -> Any:
    """Return the config of the exported model, marked, and untied: head and embedding differ after folds."""
    config = copy.deepcopy(model.config)
    packed = config.quantization_config
    mark = {"recipe": packed.recipe.get("name", ""), "true_bits": packed.true_bits, "activations": "not rounded"}
    del config.quantization_config
    setattr(config, MARK, mark)
    config.tie_word_embeddings = False
    return config


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _float_state(model: nn.Module, packed: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the float tensors of a packed model by the names of its family."""
    starts = tuple(f"{name}." for name in packed)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(starts)}
    for name, module in packed.items():
        state[f"{name}.weight"] = _weight(module)
        bias = getattr(module, "bias", None)
        if bias is not None:
            state[f"{name}.bias"] = bias
    return state


def _weight(module: nn.Module) -> Tensor:
    """Return the float weight [out, in], or table [rows, width], that computes what a packed module does."""
    transform = getattr(module, "transform", None)
    if isinstance(module, EndEmbedding):
        rows = module.dense_weight()
        return rows if transform is None else transform(rows)
    if isinstance(module, PackedLinear):
        return _before(module.dense_weight(), transform)
    assert isinstance(module, (EndLinear, TiedHead))
    columns, weight = read_half(module, "column_scale"), module.dense_weight()
    return _before(weight if columns is None else weight * columns, transform)


def _before(weight: Tensor, transform: OnlineTransform | None) -> Tensor:
    """Return W T^T [m, n], which on x is W on T(x); T = diag(scale)(left (x) right), so T^T turns and then scales."""
    if transform is None:
        return weight
    scale, left, right = transform.factors()
    turned = apply_kronecker(weight, *(None if f is None else f.T.contiguous() for f in (left, right)))
    return turned if scale is None else turned * scale

"""Guards: tensors that make a reader fail who takes a packed model for a float one.

Where this package is not imported, transformers knows nothing of `quant_method: bwla`: it warns, builds float modules,
finds none of their weights, and would fill them at random. So the checkpoint holds, under the name of each weight that
was packed, one byte (the format's version): its shape differs from the weight's, which transformers refuses.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bwla_compiler.runtime.modules import PackedExperts
from bwla_compiler.runtime.skeleton import FORMAT_VERSION


def guard_name(module: str, *, experts: bool) -> str:
    """Return the name that the float weight of a packed module had; experts': a parameter's, not a module's."""
    return module if experts else f"{module}.weight"


def guard_names(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the guards of packed modules, which are by name."""
    return {guard_name(name, experts=isinstance(module, PackedExperts)) for name, module in modules.items()}


def with_guards(tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return saved tensors with the guards of these packed modules."""
    return {**tensors, **{name: torch.tensor([FORMAT_VERSION], dtype=torch.uint8) for name in guard_names(modules)}}

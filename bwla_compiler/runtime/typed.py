"""The dtype that a packed module was last cast to, and what stands for its weight where a model asks for that dtype."""

import torch
from torch import Tensor, nn


def register_typed(
    module: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Give a module the buffer `typed`, empty and not saved: casting a model casts it, while codes stay integers."""
    module.register_buffer("typed", torch.empty(0, device=device, dtype=dtype), persistent=False)


def stand_in(module: nn.Module) -> Tensor:
    """Return what stands for the weight [out, in] of a packed module: shape, dtype and device, one NaN for all values.

    Models ask `linear.weight.dtype` before they call a linear. Who computes with the values gets NaN: there are none.
    """
    embedding = hasattr(module, "num_embeddings")
    names = ("num_embeddings", "embedding_dim") if embedding else ("out_features", "in_features")
    sizes = [int(getattr(module, name)) for name in names]
    return module.get_buffer("typed").new_full((), float("nan")).expand(sizes)

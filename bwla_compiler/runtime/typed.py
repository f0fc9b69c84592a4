"""The dtype that a packed module was last cast to, and what stands for its weight where a model asks for that dtype."""

import torch
from torch import Tensor, nn


def register_typed(
    module: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Give a module the buffer `typed`, empty and not saved: casting a model casts it, while codes stay integers."""
    module.register_buffer("typed", torch.empty(0, device=device, dtype=dtype), persistent=False)


def stand_in(module: nn.Module) -> Tensor:
    """Return what a packed module gives as its weight [out, in]: shape, dtype and device are right, every entry is NaN.

    Models ask a weight for its dtype or device before they call the module; who computes with it is to see it. One
    entry of memory.
    """
    embedding = hasattr(module, "num_embeddings")
    names = ("num_embeddings", "embedding_dim") if embedding else ("out_features", "in_features")
    typed = module.get_buffer("typed")
    nothing = torch.full((1, 1), torch.nan, dtype=typed.dtype, device=typed.device)
    return nothing.expand([int(getattr(module, name)) for name in names])

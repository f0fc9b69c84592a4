"""A second set of a model's modules, around the very same tensors."""

import copy
from typing import Any

from torch import nn


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model's modules that shares its parameters and buffers: no second set of weights."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)

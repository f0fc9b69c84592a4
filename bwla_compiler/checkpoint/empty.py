"""A model whose matrices take no memory: built from its config, with real buffers, so that it can be captured.

Every parameter is a view of one stretch of address space that is never written to, hence never backed by memory: it
has shape, strides, dtype and device, which is all that capture and planning ask for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def empty_model(config: Any) -> nn.Module:
    """Return the causal LM of a config in eval mode, float32 on the CPU; its parameters hold no values.

    Buffers hold what the model's code put there. Ties are kept. Raises whatever transformers raises for the config.
    """
    with _parameters_on_meta():
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    place_holders(model)
    return model.eval().requires_grad_(False)


def meta_model(config: Any) -> nn.Module:
    """Return the causal LM of a config on meta, buffers too: all that planning needs, at a fraction of its memory."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def place_holders(model: nn.Module) -> None:
    """Give every parameter on meta a stand-in on the CPU that takes no memory, in place; ties are kept."""
    wanted: dict[int, nn.Parameter] = {id(p): p for p in model.parameters() if p.is_meta}
    if not wanted:
        return
    stretch = torch.empty(max(p.numel() for p in wanted.values()), dtype=torch.float32)
    made = {key: nn.Parameter(_view(stretch, p), requires_grad=False) for key, p in wanted.items()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in made:
                module._parameters[name] = made[id(parameter)]


def _view(stretch: Tensor, parameter: nn.Parameter) -> Tensor:
    return stretch[: parameter.numel()].view(parameter.shape)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Have modules that are built here register their parameters on meta, and their buffers as they are.

    A parameter is moved before anything is written to it, so that its memory is given back untouched.
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]

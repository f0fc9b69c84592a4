"""Plans and graphs of the tiny models, made once a process: capture is most of what a test would cost."""

import functools

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from bwla_compiler.graph.capture import capture
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.zoo.models import tiny_model
from tests import tiny


@functools.cache
def plan(name: str) -> Plan:
    """Return the plan of `tiny.make(name)`, whatever its dtype and seed; of the zoo's tiny model for other names."""
    return make_plan(tiny.make(name) if name in tiny.CONFIGS else tiny_model(name))


@functools.cache
def graph(name: str, *, batch: int, length: int) -> GraphModule:
    """Return the captured graph of `tiny.make(name)`; whoever runs it binds it to a model first."""
    return capture(tiny.make(name), batch=batch, length=length)


class _InDoubles(TorchFunctionMode):
    """Norms and softmax hard-code float32, which would hide errors below 1e-7: they get float64 instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        lift = lambda a: torch.float64 if a is torch.float32 else a  # noqa: E731
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(lift, args), **{name: lift(value) for name, value in (kwargs or {}).items()})


def exact_logits(model: nn.Module) -> Tensor:
    """Return the logits of a float64 model on `tiny.ids()`, computed in float64 throughout."""
    with torch.no_grad(), _InDoubles():
        out = model(input_ids=tiny.ids(), use_cache=False)
    logits: Tensor = getattr(out, "logits", out)
    assert logits.dtype == torch.float64
    return logits

"""Routines as whole models meet them: Inductor's caches, gradients beside them, and models that are deleted."""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_inductor_cache
from torch.utils.checkpoint import checkpoint

from bwla_compiler.backend.entry import compile_backend
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime import native
from bwla_compiler.runtime.modules import PackedLinear
from tests import tiny

OPTIONS = {"recipe": "hadamard-rtn", "calibration": "none", "cache": False, "verify": True}


class Two(nn.Module):
    """Two linears by these names, the first one first."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.order = (first, second)
        for name in self.order:
            setattr(self, name, nn.Linear(64, 64, bias=False))

    def forward(self, x: Tensor) -> Any:
        first, second = (getattr(self, name) for name in self.order)
        return second(nn.functional.silu(first(x)))


def test_models_of_one_graph_share_no_names_through_inductors_cache() -> None:
    """`verify` compares the first results with those of the quantized model."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), fresh_inductor_cache():
        for model in (Two("a", "b"), Two("b", "a"), Two("up", "down")):
            torch._dynamo.reset()
            compiled = torch.compile(model.eval(), backend=lambda gm, i: compile_backend(gm, i, options=OPTIONS))
            assert torch.equal(compiled(x), compiled(x))


def linear_of(model: nn.Module) -> PackedLinear:
    return next(m for m in model.modules() if isinstance(m, PackedLinear))


def packed() -> nn.Module:
    model = tiny.make("llama", layers=1)
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    return model


def test_a_call_that_is_computed_again_for_gradients() -> None:
    linear = linear_of(packed())
    matrix = torch.randn(linear.out_features, 3, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda x: torch.tanh(linear(x) @ matrix), x, use_reentrant=False)
        return y.sum()

    x = torch.randn(5, linear.in_features)
    gradients = []
    torch._dynamo.reset()
    for run in (function, torch.compile(function, backend=compile_backend)):
        matrix.grad = None
        run(x).backward()
        assert matrix.grad is not None
        gradients.append(matrix.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_what_is_bound_goes_with_the_model() -> None:
    installed = native.operators()
    assert installed is not None
    model = packed()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=compile_backend)
    with torch.no_grad():
        for _ in range(2):
            compiled(tiny.ids(), use_cache=False)
    weight = linear_of(model).anchor
    kept = weakref.ref(linear_of(model))
    seen = [ref for ref in gc.get_objects() if type(ref).__name__ == "Bound" and ref.positions]
    bound = [weakref.ref(one) for one in seen if any(owner() is weight for owner in one.owners)]
    assert len(bound) == 1
    del model, compiled, weight, seen
    gc.collect()
    assert kept() is None
    assert bound[0]() is None

"""Forward hooks on linears: traced with the model, and taken over by what replaces the linears."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import bwla_compiler
from bwla_compiler.calibrate.student import students
from tests import tiny
from tests.backend import small

DOWN = "model.layers.0.mlp.down_proj"
NEAR = 0.3
"""Of a model of four planes and float activations; a hook that is missing, or runs twice, is off by more than 1."""
SETTINGS = {"weights.planes": 4, "activations.bits": 16}


class Steering:
    """A hook that adds a large constant to an output, and counts how often it was called."""

    def __init__(self) -> None:
        self.n_calls = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.n_calls += 1
        return output + 5.0 * torch.linspace(-1, 1, output.shape[-1])


@pytest.mark.parametrize("calibration", ["none", "random"])
def test_packed_linears_run_the_hooks_of_the_linears_once(calibration: str) -> None:
    model, ids, hook = small.llama().requires_grad_(False), tiny.ids(), Steering()
    handle = model.get_submodule(DOWN).register_forward_hook(hook)
    plain = small.llama().requires_grad_(False)(ids).logits
    hooked = model(ids).logits
    assert small.error(plain, hooked) > 1
    more = {"calibration.sequences": 8, "calibration.length": 16, "tuning.steps": 0} if calibration != "none" else {}
    recipe = "bwla-w1a16" if calibration != "none" else "hadamard-rtn"
    bwla_compiler.quantize(model, recipe=recipe, settings={**SETTINGS, **more}, calibration=calibration)
    hook.n_calls = 0
    assert small.error(model(ids).logits, hooked) < NEAR
    assert hook.n_calls == 1
    handle.remove()
    assert small.error(model(ids).logits, plain) < NEAR


@pytest.mark.parametrize("fails", [False, True])
def test_what_tuning_puts_in_the_place_of_packed_linears_runs_their_hooks(fails: bool) -> None:
    model, ids, hook = small.llama().requires_grad_(False), tiny.ids(), Steering()
    bwla_compiler.quantize(model, recipe="hadamard-rtn", settings=SETTINGS, calibration="none")
    model.get_submodule(DOWN).register_forward_hook(hook)
    expected = model(ids).logits
    with contextlib.suppress(KeyboardInterrupt), students(model):
        assert small.error(model(ids).logits, expected) < 1e-3
        if fails:
            raise KeyboardInterrupt
    assert torch.equal(model(ids).logits, expected)
    assert hook.n_calls == 3


def test_compiled_code_runs_the_hooks_of_a_raw_model_once(graphs: list[GraphModule]) -> None:
    model, ids = small.llama().requires_grad_(False), tiny.ids()
    model.get_submodule(DOWN).register_forward_hook(Steering())
    with torch.no_grad():
        assert small.error(small.compiled(model, **small.PRECISE)(ids).logits, model(ids).logits) < NEAR
    assert len(graphs) == 1

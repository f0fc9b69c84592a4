"""Edits of sealed modules: told where compiled code relies on them, and only there."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bwla_compiler.runtime import sealed
from bwla_compiler.runtime.sealed import Sealed, rely_on


class Module(Sealed):
    def __init__(self) -> None:
        super().__init__()
        self.kind, self.activation_bits = "rms_norm", 6
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("pair", None)
        self.register_buffer("signs", torch.zeros(1, 2, 2, dtype=torch.uint8))
        self.register_parameter("weight", nn.Parameter(torch.ones(2)))
        self.part = nn.Identity()


def is_told(edit: Callable[[Module], object], *, relied_on: bool = True) -> bool:
    module = Module()
    if relied_on:
        rely_on(module)
    before = sealed.EDITS
    edit(module)
    return before != sealed.EDITS


EDITS: dict[str, Callable[[Module], object]] = {
    "a buffer comes": lambda m: setattr(m, "pair", torch.ones(1)),
    "a buffer is registered": lambda m: m.register_buffer("pair", torch.ones(1)),
    "a buffer goes": lambda m: setattr(m, "scale", None),
    "a buffer is deleted": lambda m: delattr(m, "scale"),
    "a parameter goes": lambda m: setattr(m, "weight", None),
    "a parameter is registered": lambda m: m.register_parameter("bias", nn.Parameter(torch.ones(1))),
    "a module changes": lambda m: setattr(m, "part", nn.Identity()),
    "a module is added": lambda m: m.add_module("more", nn.Identity()),
    "signs of another shape": lambda m: setattr(m, "signs", torch.zeros(2, 2, 2, dtype=torch.uint8)),
    "a value changes": lambda m: setattr(m, "kind", "layer_norm"),
    "a method is covered": lambda m: setattr(m, "forward", print),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_told(name: str) -> None:
    assert is_told(EDITS[name])
    assert not is_told(EDITS[name], relied_on=False)


OTHERS: dict[str, Callable[[Module], object]] = {
    "a buffer is another": lambda m: setattr(m, "scale", torch.zeros(3)),
    "a parameter is another": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(3))),
    "signs of one shape": lambda m: setattr(m, "signs", m.signs.clone()),
    "the same value": lambda m: setattr(m, "kind", "rms_norm"),
    "training": lambda m: m.train(not m.training),
    "bits, which Dynamo checks": lambda m: setattr(m, "activation_bits", 8),
    "a cast": lambda m: m.half(),
    "loading": lambda m: m.load_state_dict(Module().state_dict(), assign=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_compiled_code_is_passed_anew_is_no_edit(name: str) -> None:
    assert not is_told(OTHERS[name])

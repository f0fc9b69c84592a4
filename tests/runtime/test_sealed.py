"""Facts of sealed modules: they follow every edit, and tell apart what was packed otherwise."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bwla_compiler.runtime.sealed import Sealed
from bwla_compiler.spec import TransformSpec


class Module(Sealed):
    def __init__(self) -> None:
        super().__init__()
        self.kind, self.activation_bits = "rms_norm", 6
        self.spec = TransformSpec(kind="okt")
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("pair", None)
        self.register_buffer("signs", torch.zeros(1, 2, 2, dtype=torch.uint8))
        self.register_parameter("weight", nn.Parameter(torch.ones(2)))
        self.part = nn.Identity()
        self.seal()


def is_told(edit: Callable[[Module], object]) -> bool:
    module = Module()
    before = module.facts
    edit(module)
    return before != module.facts


EDITS: dict[str, Callable[[Module], object]] = {
    "a buffer comes": lambda m: setattr(m, "pair", torch.ones(1)),
    "a buffer is registered": lambda m: m.register_buffer("pair", torch.ones(1)),
    "a buffer goes": lambda m: setattr(m, "scale", None),
    "a buffer is deleted": lambda m: delattr(m, "scale"),
    "a buffer of another shape": lambda m: setattr(m, "scale", torch.ones(3)),
    "a buffer of another dtype": lambda m: m.double(),
    "a parameter goes": lambda m: setattr(m, "weight", None),
    "a parameter is registered": lambda m: m.register_parameter("bias", nn.Parameter(torch.ones(1))),
    "a parameter of another shape": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(3))),
    "a module changes": lambda m: setattr(m, "part", nn.Identity()),
    "a module is added": lambda m: m.add_module("more", nn.Identity()),
    "signs of another shape": lambda m: setattr(m, "signs", torch.zeros(2, 2, 2, dtype=torch.uint8)),
    "a value changes": lambda m: setattr(m, "kind", "layer_norm"),
    "a frozen value changes": lambda m: setattr(m, "spec", TransformSpec(kind="hadamard")),
    "bits": lambda m: setattr(m, "activation_bits", 8),
    "a method is covered": lambda m: setattr(m, "forward", print),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_told(name: str) -> None:
    assert is_told(EDITS[name])


OTHERS: dict[str, Callable[[Module], object]] = {
    "a buffer is another": lambda m: setattr(m, "scale", torch.zeros(2)),
    "a parameter is another": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(2))),
    "in place": lambda m: m.signs.fill_(1),  # type: ignore[operator]
    "the same value": lambda m: setattr(m, "kind", "rms_norm"),
    "an equal value": lambda m: setattr(m, "spec", TransformSpec(kind="okt")),
    "training": lambda m: m.train(not m.training),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_compiled_code_serves_is_no_edit(name: str) -> None:
    assert not is_told(OTHERS[name])


def test_modules_that_are_alike_have_one_text() -> None:
    class Alike(Sealed):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(size))
            self.seal()

    assert Alike(2).facts is Alike(2).facts
    assert copy.deepcopy(Alike(2)).facts == Alike(2).facts
    assert Alike(2).facts != Alike(3).facts


def test_parts_that_nothing_is_known_of_are_told_by_which_they_are() -> None:
    assert Module().facts != Module().facts  # each with an Identity of its own


def test_nothing_is_told_before_a_module_is_sealed() -> None:
    module = Sealed()
    module.kind = "rms_norm"
    assert module.facts == ""

"""What tuning takes of memory, and what is given up where there is too little."""

from dataclasses import replace

import pytest
import torch

from bwla_compiler.calibrate import affordable as module
from bwla_compiler.calibrate.affordable import affordable, tuning_bytes
from bwla_compiler.recipe import Tuning
from tests import tiny

TUNING = Tuning(steps=3, signs=0.4)
IN_TURN = replace(TUNING, signs_at_once="block")


def test_bytes_are_those_of_the_pack_the_head_and_the_latents() -> None:
    model = tiny.make("llama")
    weights = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    (block,) = {sum(p.numel() for p in layer.parameters() if p.ndim >= 2) for layer in model.model.layers}
    fixed = weights // 2 + 8 * model.lm_head.weight.numel()
    assert tuning_bytes(TUNING, model) == fixed + 2 * weights
    assert tuning_bytes(IN_TURN, model) == fixed + 2 * block
    assert tuning_bytes(replace(TUNING, signs=0.0), model) == fixed
    assert tuning_bytes(Tuning(), model) == 0


@pytest.mark.parametrize(
    ("fits", "expected", "why"),
    [
        (TUNING, TUNING, ""),
        (IN_TURN, IN_TURN, "signs learn one block at a time"),
        (replace(IN_TURN, signs=0.0), replace(IN_TURN, signs=0.0), "signs do not learn"),
        (Tuning(), replace(IN_TURN, steps=0), "nothing is tuned"),
    ],
)
def test_as_little_is_given_up_as_will_do(
    fits: Tuning, expected: Tuning, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make("llama")
    monkeypatch.setattr(module, "memory_bytes", lambda: 2 * tuning_bytes(fits, model))
    found, change = affordable(TUNING, model)
    assert found == expected
    assert change.startswith(why)
    assert bool(change) == bool(why)


def test_what_is_not_tuned_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_bytes", lambda: 0)
    assert affordable(Tuning(), torch.nn.Linear(2, 2)) == (Tuning(), "")

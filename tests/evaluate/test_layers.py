"""Per-layer error: none where only the basis differs, some where weights do, and it names the block."""

import copy
from typing import Any

import pytest
import torch

from bwla_compiler import api
from bwla_compiler.errors import CalibrationError, ModelError
from bwla_compiler.evaluate.layers import layer_errors, residual_turn
from tests import tiny
from tests.backend import small

BLOCKS = ["model.layers.0", "model.layers.1"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make("llama")


def test_a_rotated_model_has_none(model: Any) -> None:
    rotated: Any = copy.deepcopy(model)
    api.rotate(rotated)
    turn = residual_turn(model, rotated)
    assert float((turn @ turn.T - torch.eye(64, dtype=torch.float64)).abs().max()) < 1e-10
    assert float((turn - torch.eye(64)).abs().max()) > 0.1  # it was turned
    errors = layer_errors(model, rotated, tiny.ids())
    assert list(errors) == BLOCKS
    assert max(errors.values()) < 1e-4  # float32 through folds and two blocks


def test_the_first_block_that_differs_is_named(model: Any) -> None:
    changed: Any = copy.deepcopy(model)
    # R is found in float64, and is the identity but for its rounding
    assert max(layer_errors(model, changed, tiny.ids()).values()) < 1e-6
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    errors = layer_errors(model, changed, tiny.ids())
    assert errors["model.layers.0"] < 1e-6
    assert errors["model.layers.1"] > 0.01


def test_quantizing_shows_in_every_block_and_hooks_are_gone(model: Any) -> None:
    packed: Any = copy.deepcopy(model)
    api.quantize(packed, recipe="hadamard-rtn", calibration="none")
    told: list[tuple[str, int, int]] = []
    errors = layer_errors(model, packed, tiny.ids(), progress=lambda *state: told.append(state))
    assert all(0.05 < error < 2 for error in errors.values())
    assert told[-1] == ("layers", 3, 3)
    assert not any(m._forward_hooks for net in (model, packed) for m in net.modules())


def test_models_of_different_widths_are_refused(model: Any) -> None:
    with pytest.raises(ModelError, match=r"are 64 and \d+ wide: one was not made from the other"):
        layer_errors(model, small.llama(), tiny.ids())


def test_unusable_tokens_are_refused(model: Any) -> None:
    with pytest.raises(CalibrationError):
        layer_errors(model, model, torch.full((1, 5), 999))

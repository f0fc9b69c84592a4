import math

import pytest
import torch

from bwla_compiler.evaluate.verification import Verification, verify_rotations
from tests import planned, tiny
from tests.wider import wider


@pytest.mark.parametrize("name", ["llama", "gpt2", *wider("qwen2", "qwen3", "mistral", "phi3", "opt")])
def test_rotations_change_nothing(name: str) -> None:
    model = tiny.make(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = verify_rotations(model)
    assert found.error <= 1e-10
    assert found.n_free >= 3
    assert found.passed
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_free_is_a_failure_and_so_are_a_large_error_and_nan() -> None:
    plan = planned.plan("llama")
    assert not Verification(0, 0.0, plan).passed
    assert not Verification(3, 1e-3, plan).passed
    assert not Verification(3, math.nan, plan).passed

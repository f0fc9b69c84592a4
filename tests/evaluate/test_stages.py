"""The function after every pass: exact ones are, and one that is broken on purpose is named."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from bwla_compiler.errors import PlanError
from bwla_compiler.evaluate.stages import Stage, check_passes, first_broken, require_passed
from bwla_compiler.passes.base import DropGain, PassContext, PassReport
from bwla_compiler.passes.fold_norms import FoldNorms
from bwla_compiler.passes.fold_rotations import FoldRotations
from bwla_compiler.passes.untie import Untie
from bwla_compiler.recipe import load_recipe
from bwla_compiler.zoo.models import tiny_model
from tests import tiny
from tests.wider import wider

STEPS = ["untie", "fold-norms", "fold-rotations", "insert-online"]


@pytest.mark.parametrize("name", ["llama-tied", *wider("gpt2", "qwen3", "mixtral")])
def test_every_exact_pass_is_exact(name: str) -> None:
    model = tiny.make(name, layers=1) if name in tiny.CONFIGS else tiny_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stages = check_passes(model, load_recipe("bwla-w1a6"))
    assert [stage.name for stage in stages] == STEPS
    assert all(stage.passed for stage in stages), stages
    assert stages[1].n_changed > 0
    assert stages[3].n_changed > 0  # the transforms compute in float64 here, as their kernels do not
    assert first_broken(stages) == ""
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@dataclass(frozen=True)
class ForgetGains:
    """Folds norms, but leaves their gains where they were: they act twice."""

    name: ClassVar[str] = "forget-gains"

    def run(self, ctx: PassContext) -> PassReport:
        """Emit what FoldNorms does, without the edits that reset the norms."""
        done = FoldNorms().run(ctx)
        kept = [edit for edit in done.edits if not isinstance(edit, DropGain)]
        return PassReport(self.name, kept, done.changed, done.skipped)


def test_a_pass_that_is_broken_on_purpose_is_named_and_is_the_last() -> None:
    steps = (Untie(), ForgetGains(), FoldRotations())
    stages = check_passes(tiny.make("llama", layers=1), load_recipe("bwla-w1a6"), passes=steps)
    assert [stage.name for stage in stages] == ["untie", "forget-gains"]
    assert stages[0].passed
    assert stages[1].error > 1e-2
    assert first_broken(stages).startswith("forget-gains changes what the model computes")
    assert "after untie it was 0.0e+00" in first_broken(stages)
    with pytest.raises(PlanError, match="forget-gains"):
        require_passed(stages)


def test_nan_is_a_failure() -> None:
    assert not Stage("x", 1, 0, float("nan")).passed


def test_a_recipe_that_does_not_rotate_has_nothing_to_check() -> None:
    model: nn.Module = tiny.make("llama", layers=1)
    assert all(stage.n_changed == 0 for stage in check_passes(model, load_recipe("rtn")))

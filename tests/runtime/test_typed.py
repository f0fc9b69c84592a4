import copy

import pytest
import torch
from torch import nn

from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, PackedLinear, TiedHead
from tests import tiny


@pytest.fixture(scope="module")
def packed() -> nn.Module:
    model = tiny.make("llama-tied")
    quantize_model(model, load_recipe("rtn"), None)
    return model


def test_every_packed_module_tells_shape_and_dtype(packed: nn.Module) -> None:
    modules = [m for m in packed.modules() if isinstance(m, (PackedLinear, EndEmbedding, TiedHead))]
    assert {type(m) for m in modules} == {PackedLinear, EndEmbedding, TiedHead}
    assert {m.weight.dtype for m in modules} == {torch.float32}
    linear = next(m for m in modules if isinstance(m, PackedLinear))
    assert tuple(linear.weight.shape) == (linear.out_features, linear.in_features)
    assert tuple(packed.lm_head.weight.shape) == tuple(packed.model.embed_tokens.weight.shape)
    assert EndLinear.from_weight(torch.ones(3, 2, dtype=torch.bfloat16)).weight.dtype == torch.bfloat16


def test_casting_the_model_casts_what_is_told_and_no_code(packed: nn.Module) -> None:
    half = copy.deepcopy(packed).to(torch.bfloat16)
    linears = {n: m for n, m in packed.named_modules() if isinstance(m, PackedLinear)}
    assert {half.get_submodule(n).weight.dtype for n in linears} == {torch.bfloat16}
    assert all(torch.equal(half.get_submodule(n).signs, m.signs) for n, m in linears.items())


def test_the_stand_in_is_not_saved_and_has_no_values(packed: nn.Module) -> None:
    assert not [name for name in packed.state_dict() if name.endswith(("typed", ".weight")) and "norm" not in name]
    weight = packed.lm_head.weight
    assert weight.device.type == "cpu"
    assert weight.isnan().all()
    assert weight.untyped_storage().nbytes() == 4

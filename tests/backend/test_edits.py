"""Edits of weights under compiled code: each is answered with exactly the logits of freshly quantized weights."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

import bwla_compiler
from bwla_compiler.backend.raw import variants_of
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.errors import WeightError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.recipe import load_recipe
from tests import tiny
from tests.backend import small

RTN = {"recipe": "rtn"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(small.llama())


def fresh(model: nn.Module, plan: Plan | None = None) -> Tensor:
    """Return the logits of a copy quantized now; rtn touches each weight alone, whatever the plan folds."""
    quantized = copy.deepcopy(model)
    quantize_model(quantized, load_recipe("rtn"), None, plan=plan)
    return quantized(tiny.ids()).logits


def up(model: nn.Module) -> nn.Linear:
    return model.model.layers[0].mlp.up_proj


def multiply(model: nn.Module) -> None:
    up(model).weight.mul_(torch.linspace(0.1, 2, 32))


def load(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.3 + 0.01 for k, v in model.state_dict().items()})


def assign(model: nn.Module) -> None:
    model.load_state_dict({k: v * 0.9 - 0.02 for k, v in model.state_dict().items()}, assign=True)


def set_data(model: nn.Module) -> None:
    up(model).weight.data = torch.randn_like(up(model).weight)


def swap(model: nn.Module) -> None:
    weight = up(model).weight
    torch.utils.swap_tensors(weight, nn.Parameter(torch.randn_like(weight)))


def replace(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48, bias=False)


def gain(model: nn.Module) -> None:
    model.model.norm.weight.mul_(2).sub_(0.1)


def embedding(model: nn.Module) -> None:
    model.model.embed_tokens.weight.mul_(-1.5)


EDITS: list[Callable[[nn.Module], None]] = [multiply, load, assign, set_data, swap, replace, gain, embedding]


def test_edits_that_torch_sees(graphs: list[GraphModule], plan: Plan) -> None:
    model = small.llama()
    fast = small.compiled(model, **RTN)
    with torch.no_grad():
        before = fast(tiny.ids()).logits
        assert torch.equal(before, fresh(model, plan))
        for edit in EDITS:
            edit(model)
            found = fast(tiny.ids()).logits
            assert small.error(found, before) > 0.01, edit.__name__  # the edit moved something
            assert torch.equal(found, fresh(model, plan)), edit.__name__
            before = found
    assert len(graphs) == 1  # none of them needed new code


@pytest.mark.exhaustive
def test_edits_of_structure_are_planned_anew(graphs: list[GraphModule]) -> None:
    model = small.llama()
    fast = small.compiled(model, **RTN)
    with torch.no_grad():
        fast(tiny.ids())
        model.model.layers[0].mlp.up_proj = nn.Linear(32, 48, bias=True)
        assert torch.equal(fast(tiny.ids()).logits, fresh(model))
        up(model).bias.add_(1)
        assert torch.equal(fast(tiny.ids()).logits, fresh(model))
        model.bfloat16()
        found = fast(tiny.ids()).logits
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, small.only_variant(model).quantized(tiny.ids()).logits)


def test_an_edit_of_folded_weights_is_folded_again(graphs: list[GraphModule]) -> None:
    model = small.llama()
    fast = small.compiled(model)
    with torch.no_grad():
        fast(tiny.ids())
        gain(model)
        multiply(model)
        found = fast(tiny.ids()).logits
        other = copy.deepcopy(model)
        torch._dynamo.reset()
        assert torch.equal(found, small.compiled(other)(tiny.ids()).logits)


def test_an_edit_that_torch_cannot_see_needs_refresh(graphs: list[GraphModule], plan: Plan) -> None:
    model = small.llama()
    fast = small.compiled(model, **RTN)
    with torch.no_grad():
        before = fast(tiny.ids()).logits
        up(model).weight.data.mul_(torch.randn_like(up(model).weight))
        assert torch.equal(fast(tiny.ids()).logits, before)
        bwla_compiler.refresh(fast)
        assert torch.equal(fast(tiny.ids()).logits, fresh(model, plan))


def test_a_damaged_edit_names_the_weight(graphs: list[GraphModule]) -> None:
    model, x = small.mlp(), torch.randn(2, 32)
    fast = small.compiled(model)
    with torch.no_grad():
        fast(x)
        model[2].weight[0, 0] = float("nan")
        with pytest.raises(WeightError, match=r"2\.weight holds 1 NaN"):
            fast(x)


def test_a_new_model_in_a_deleted_ones_place(graphs: list[GraphModule]) -> None:
    x = torch.randn(3, 32)
    for seed in range(4):  # addresses are taken again
        model = small.mlp(seed=seed)
        fast = small.compiled(model)
        with torch.no_grad():
            assert torch.equal(fast(x), small.only_variant(model).quantized(x))
        dead = weakref.ref(model)
        del model, fast
        gc.collect()
        assert dead() is None  # compiled code and its copies do not keep a model alive


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_instances_than_dynamo_recompiles(graphs: list[GraphModule]) -> None:
    x = torch.randn(3, 32)
    models = [small.mlp(seed=seed) for seed in range(4)]
    fast = [small.compiled(model) for model in models]
    with torch.no_grad():
        for _ in range(2):
            for model, one in zip(models, fast, strict=True):
                assert torch.equal(one(x), small.only_variant(model).quantized(x))
    assert len(graphs) == 4


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_graphs_than_dynamo_recompiles_are_announced(
    graphs: list[GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = small.mlp(), torch.randn(3, 32)
    fast = small.compiled(model)
    with torch.no_grad():
        fast(x)
        assert "recompile_limit" not in caplog.text
        fast(x[0])
        assert "Sequential was compiled for 2 ways of calling it" in caplog.text
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            fast(x[None])


def test_freed_weights(graphs: list[GraphModule]) -> None:
    model, ids = small.llama(tied=True), tiny.ids()
    other = copy.deepcopy(model)
    fast = small.compiled(model, free_weights=True)
    with torch.no_grad():
        held = stored(model)
        found = fast(ids).logits
        assert held > 8_000 > 1_000 > stored(model)  # vectors stay
        quantized = small.only_variant(model).quantized
        assert torch.equal(found, quantized(ids).logits)
        assert torch.equal(fast(ids[:, :8]).logits, quantized(ids[:, :8]).logits)
        step = fast(ids[:, 8:9], past_key_values=quantized(ids[:, :8], use_cache=True).past_key_values).logits
        assert small.error(step[:, 0], quantized(ids).logits[:, 8]) < 1e-5
        with pytest.raises(BackendCompilerFailed, match=r"released by free_weights=True.*load the model anew"):
            fast(inputs_embeds=torch.randn(2, 7, 32))
        with pytest.raises(WeightError, match="released by free_weights=True"):
            copy.deepcopy(model)
        with pytest.raises(WeightError, match="neither copied nor saved"):
            model.state_dict()
        model.lm_head.weight.data = other.lm_head.weight.data
        with pytest.raises(WeightError, match="edited after free_weights=True"):
            fast(ids)


def stored(model: nn.Module) -> int:
    """Return the bytes of the parameters' storages."""
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def test_a_model_whose_weights_were_released_is_not_quantized() -> None:
    model = small.llama()
    model.lm_head.weight.data.untyped_storage().resize_(0)
    with pytest.raises(WeightError, match=r"lm_head\.weight was released by free_weights=True"):
        bwla_compiler.quantize(model, recipe="rtn")


class Branch(nn.Module):
    """Takes one of two branches, which Dynamo makes graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
        y: Tensor = self.up(chosen)
        return y


def test_a_graph_with_graphs_of_its_own_stays_in_floats(caplog: pytest.LogCaptureFixture) -> None:
    module = Branch()
    x = torch.ones(2, 16)
    with torch.no_grad():
        assert torch.allclose(small.compiled(module)(x), module(x), atol=1e-6)
    assert "which no pass looks into" in caplog.text


def test_edits_of_a_packed_model(graphs: list[GraphModule]) -> None:
    model = small.llama()
    quantize_model(model, load_recipe("rtn"), None)
    fast = small.compiled(model)
    with torch.no_grad():
        before = fast(tiny.ids()).logits
        assert torch.equal(before, model(tiny.ids()).logits)
        edits: list[Callable[[], object]] = [
            lambda: up(model).signs.bitwise_not_(),
            lambda: up(model).row_scale.add_(256),
            lambda: model.load_state_dict({k: v.flip(0) for k, v in model.state_dict().items()}),
            lambda: setattr(up(model), "signs", up(model).signs.flip(1)),
        ]
        for edit in edits:
            edit()
            found = fast(tiny.ids()).logits
            assert not torch.equal(found, before)
            assert torch.equal(found, model(tiny.ids()).logits)
            before = found
        up(model).signs.data.bitwise_not_()
        assert torch.equal(fast(tiny.ids()).logits, before)
        bwla_compiler.refresh(fast)
        found = fast(tiny.ids()).logits
        assert not torch.equal(found, before)
        assert torch.equal(found, copy.deepcopy(model)(tiny.ids()).logits)
    assert variants_of(model) == ()

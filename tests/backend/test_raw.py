"""torch.compile(model, backend="bwla") of raw models: what is folded, which graphs share it, which modules it takes."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule
from transformers import StaticCache

from bwla_compiler.backend import compile_backend, raw, refresh
from bwla_compiler.backend.compiled import TOLERANCE
from bwla_compiler.backend.raw import variants_of
from bwla_compiler.errors import PlanError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.numerics.kronecker import haar
from bwla_compiler.tokens import vocabulary
from bwla_compiler.zoo.models import tiny_model
from tests import tiny
from tests.backend import small
from tests.wider import wider

SAME = 1e-5
"""The same operations in the same order; room for matrix products of other shapes."""


UNFOLDED = {
    **{name: {"o_proj", "down_proj"} for name in ("llama", "qwen2", "qwen3", "mistral", "phi3")},
    "gpt2": {"c_proj"},
    "opt": {"out_proj", "fc2"},
}


@pytest.mark.parametrize("name", ["llama", *wider("gpt2", "qwen2", "qwen3", "mistral", "phi3", "opt")])
def test_four_lengths_are_two_graphs_of_one_folded_copy(name: str, graphs: list[GraphModule]) -> None:
    model = small.architecture(name)
    fast = small.compiled(model)
    with torch.no_grad():
        for length, most in ((11, 1), (5, 2), (17, 2), (24, 2)):
            ids = tiny.ids(length=length)
            found = fast(ids).logits
            variant = small.only_variant(model)
            assert small.error(found, variant.quantized(ids).logits) < SAME
            assert len(graphs) <= most
    assert variant.plan.basis("residual").freedom in ("free", "fixes-ones")
    # the cache pins values, and with them what attention's output projection reads; activations pin the last input
    assert {x.name.rpartition(".")[2] for x in variant.plan.linears if x.decision != "folded"} == UNFOLDED[name]


@pytest.mark.parametrize("name", ["falcon", *wider("gemma2")])
def test_what_a_module_does_beside_its_product_is_done_once(name: str, graphs: list[GraphModule]) -> None:
    """Gemma's embedding multiplies by a number; Falcon's linears are x @ weight.T."""
    model = tiny_model(name)
    ids = tiny.ids(length=9) % vocabulary(model)
    fast = small.compiled(model, **{"weights.planes": 4, "activation_bits": 16})
    with torch.no_grad():
        found, expected = fast(ids).logits, model(ids).logits
        variant = small.only_variant(model)
        assert small.error(found, variant.quantized(ids).logits) < SAME
    assert len(graphs) == 1
    assert variant.recipe.residual == "folded"
    # a tiny model multiplies what four planes leave; anything done twice, or not at all, gives 0.9 and more
    assert small.error(found, expected) < 0.6


@pytest.mark.parametrize("name", ["llama-tied", *wider("gpt2")])
def test_without_a_cache_the_same_copy_serves(name: str, graphs: list[GraphModule]) -> None:
    model = small.architecture(name)
    fast = small.compiled(model)
    with torch.no_grad():
        cached, plain = fast(tiny.ids()).logits, fast(tiny.ids(), use_cache=False).logits
    assert len(graphs) == 2
    assert small.only_variant(model).recipe.residual == "folded"
    assert small.error(plain, cached) < SAME


def first_keys_and_values(cache: transformers.DynamicCache) -> tuple[Tensor, Tensor]:
    return cache.layers[0].keys, cache.layers[0].values


def test_the_cache_is_in_the_models_own_basis(graphs: list[GraphModule]) -> None:
    model, ids = small.llama(), tiny.ids()
    fast = small.compiled(model, **small.PRECISE)
    with torch.no_grad():
        theirs, ours = (m(ids[:, :10], use_cache=True).past_key_values for m in (model, fast))
        rotation = haar(16, generator=torch.Generator().manual_seed(0)).float()
        pairs = zip(first_keys_and_values(ours), first_keys_and_values(theirs), strict=True)
        for found, expected in pairs:
            assert small.error(found, expected) < 0.3  # four planes of the projection; measured 0.16 and less
            assert small.error(found @ rotation, expected) > 1.0
        whole = model(ids).logits[:, -1]
        mixed = model(ids[:, 10:], past_key_values=ours).logits[:, -1]  # compiled prefill, eager decode
        assert small.error(mixed, whole) < 0.3
        reverse = fast(ids[:, 10:], past_key_values=theirs).logits[:, -1]
        assert small.error(reverse, whole) < 0.3
    assert small.only_variant(model).recipe.residual == "folded"


@pytest.mark.parametrize("static", [True, *wider(False)])
def test_prefill_and_decode_are_the_whole(static: bool, graphs: list[GraphModule]) -> None:
    model, ids = small.llama(), tiny.ids()
    fast = small.compiled(model)
    with torch.no_grad():
        whole = fast(ids).logits[:, -1]
        cache = StaticCache(config=model.config, max_cache_len=16) if static else None
        cache = fast(ids[:, :10], past_key_values=cache, use_cache=True).past_key_values
        last = fast(ids[:, 10:], past_key_values=cache).logits[:, -1]
    assert small.error(last, whole) < SAME
    assert small.only_variant(model).recipe.residual == "folded"


def test_another_module_kind(graphs: list[GraphModule]) -> None:
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    torch.manual_seed(0)
    bert, mlp = transformers.BertModel(config).eval(), small.mlp()
    with torch.no_grad():
        found = small.compiled(bert)(tiny.ids()).last_hidden_state
        assert small.error(found, small.only_variant(bert).quantized(tiny.ids()).last_hidden_state) < SAME
        x = torch.randn(5, 32)
        found = small.compiled(mlp, **small.PRECISE)(x)
        assert small.error(found, small.only_variant(mlp).quantized(x)) < SAME
        assert small.error(found, mlp(x)) < 0.3


def test_a_function_over_a_model(graphs: list[GraphModule]) -> None:
    model = small.llama()
    with torch.no_grad():
        found = small.compiled(lambda ids: model(ids).logits)(tiny.ids())
    assert small.error(found, small.only_variant(model).quantized(tiny.ids()).logits) < SAME


def test_a_function_over_two_modules_is_refused(graphs: list[GraphModule]) -> None:
    body, head = small.mlp(), nn.Linear(10, 4)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=r"2 modules .Sequential, Linear.*one nn.Module"):
        small.compiled(lambda x: head(body(x)))(torch.randn(3, 32))


def test_a_function_over_a_module_and_what_has_no_linears(graphs: list[GraphModule]) -> None:
    norm, body, table = nn.LayerNorm(32), small.mlp(), nn.Parameter(torch.randn(10, 4))
    x = torch.randn(3, 32)
    with torch.no_grad():
        found = small.compiled(lambda x: body(norm(x)) @ table)(x)
        assert small.error(found, small.only_variant(body).quantized(norm(x)) @ table) < SAME


@pytest.mark.exhaustive
def test_two_parts_of_one_model_in_a_function(graphs: list[GraphModule]) -> None:
    model = small.llama()
    with torch.no_grad():
        found = small.compiled(lambda ids: model.lm_head(model.model(ids).last_hidden_state))(tiny.ids())
    assert small.error(found, small.only_variant(model).quantized(tiny.ids()).logits) < SAME


def test_hidden_states_are_not_turned(graphs: list[GraphModule]) -> None:
    model = small.llama()
    with torch.no_grad():
        body = small.compiled(model.model, **small.PRECISE)(tiny.ids()).last_hidden_state
        variant = small.only_variant(model.model)
        assert variant.plan.bases == () or all(b.freedom == "pinned" for b in variant.plan.bases)
        expected = model(tiny.ids(), output_hidden_states=True)
        assert small.error(body, expected.hidden_states[-1]) < 0.3  # measured 0.1; a rotated one is 1.4 off
        found = small.compiled(model, fullgraph=False, **small.PRECISE)(tiny.ids(), output_hidden_states=True)
        for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert small.error(ours, theirs) < 0.3
        assert small.error(found.logits, expected.logits) < 0.3


def test_embeddings_as_inputs_get_a_copy_without_folds(graphs: list[GraphModule]) -> None:
    model = small.llama()
    fast = small.compiled(model, **small.PRECISE)
    with torch.no_grad():
        expected = model(tiny.ids()).logits
        assert small.error(fast(tiny.ids()).logits, expected) < 0.3
        found = fast(inputs_embeds=model.get_input_embeddings()(tiny.ids())).logits
        assert small.error(found, expected) < 0.3
    assert [variant.recipe.residual for variant in variants_of(model)] == ["folded", "none"]


def test_graph_breaks(graphs: list[GraphModule]) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = small.mlp(), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x.relu())

    model, x = Broken().eval(), torch.randn(3, 32)
    with torch.no_grad():
        fast = small.compiled(model, fullgraph=False, **small.PRECISE)
        assert small.error(fast(x), model(x)) < 0.3
        for parameter in model.parameters():
            parameter.data.mul_(-1.5)
        refresh(model)  # each part has a quantized copy of its own
        assert small.error(fast(x), model(x)) < 0.3
        assert len(graphs) == 2


def test_compiled_by_inductor() -> None:
    model = small.llama(tied=True)
    fast = torch.compile(model, backend=compile_backend, fullgraph=True, options={**small.OPTIONS, "verify": True})
    with torch.no_grad():
        for factor in (1.0, -1.5):  # the second: quantized again into the tensors that Inductor's code reads
            model.model.embed_tokens.weight.mul_(factor)
            found = fast(tiny.ids()).logits
            expected = small.only_variant(model).quantized(tiny.ids()).logits
            # activations at the edge of two codes may round the other way after float32 sums in another order
            assert small.error(found, expected) < TOLERANCE


def test_linears_that_cannot_be_planned_stay_in_floats_aloud(
    graphs: list[GraphModule], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(model: nn.Module, *, graph: GraphModule) -> Plan:
        raise PlanError("its sizes depend on data")

    monkeypatch.setattr(raw, "make_plan", refuse)
    model, x = small.mlp(), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(small.compiled(model, cache=False)(x), model(x))
    assert "a graph of Sequential stays in floats: its sizes depend on data" in caplog.text

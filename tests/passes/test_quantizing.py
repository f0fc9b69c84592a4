"""The passes that change numbers: insert-online (which does not), quantize-linears, quantize-ends."""

import pytest
import torch
from torch import nn

from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.numerics.signs import round_signs
from bwla_compiler.passes.base import InsertTransform, PassContext
from bwla_compiler.passes.insert_online import InsertOnline, factors_of
from bwla_compiler.passes.pipeline import folding_passes, run_pass
from bwla_compiler.passes.quantize_ends import QuantizeEnds, is_embedding
from bwla_compiler.passes.quantize_linears import QuantizeLinears
from bwla_compiler.recipe import Recipe, load_recipe
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, PackedLinear, TiedHead
from bwla_compiler.runtime.transformed import TransformedLinear
from bwla_compiler.spec import Coding
from tests import planned, tiny

DOWN = "model.layers.0.mlp.down_proj"
OUT = "model.layers.0.self_attn.o_proj"
QUERY = "model.layers.0.self_attn.q_proj"


def context(model: nn.Module, name: str, recipe: Recipe | None = None) -> PassContext:
    """Return what passes need for `tiny.make(name)`."""
    recipe = recipe or load_recipe("bwla-w1a6", {"transform.iterations": 3})
    return PassContext(model, planned.plan(name), recipe, 0)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.ids()).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("recipe", ["bwla-w1a6", "hadamard-rtn"])
def test_online_transforms_change_nothing(name: str, recipe: str) -> None:
    model = tiny.make(name)
    ctx = context(model, name, load_recipe(recipe, {"transform.iterations": 3}))
    before = logits(model)
    groups = tuple(g.name for g in ctx.plan.groups)
    x_max = {g.name: torch.rand(g.in_features) + 0.1 for g in ctx.plan.groups}
    report = run_pass(model, InsertOnline(groups, x_max=x_max), ctx)
    assert len(report.changed) == 4
    assert sum(isinstance(m, TransformedLinear) for m in model.modules()) == 4
    # float32 products in another order, through factors that the weights undo as they are stored
    assert relative(logits(model), before) < 1e-4


def test_the_factor_of_a_head_is_not_applied_twice() -> None:
    ctx = context(tiny.make("qwen3"), "qwen3")
    sizes = factors_of(ctx.plan.linear(OUT), load_recipe("bwla-w1a6"))
    assert (sizes.n1, sizes.n2, sizes.right_folded) == (4, 16, True)
    (edit,) = InsertOnline((OUT,)).run(ctx).edits
    assert isinstance(edit, InsertTransform)
    assert edit.left is not None
    assert edit.left.shape == (4, 4)
    assert edit.right is None
    assert edit.scale is None  # no activations were seen, so nothing is smoothed


def test_a_budget_leaves_blocks_or_nothing_and_the_function_as_it_is() -> None:
    model = tiny.make("qwen3")
    before = logits(model)
    # decoding a token of this model on one core, 3 x H32 takes 6% of down_proj's modelled time
    blocks = context(model, "qwen3", load_recipe("bwla-w1a6", {"transform.budget": 0.05}))
    report = run_pass(model, InsertOnline((DOWN,)), blocks)
    (edit,) = report.edits
    assert isinstance(edit, InsertTransform)
    assert (edit.kind, edit.left) == ("hadamard", None)
    assert edit.right is not None
    ((name, reason),) = report.skipped
    assert name == DOWN
    assert "kronecker takes" in reason
    assert f"blocks of {edit.right.shape[0]} channels" in reason
    assert relative(logits(model), before) < 1e-4
    nothing = context(tiny.make("qwen3"), "qwen3", load_recipe("bwla-w1a6", {"transform.budget": 0.0}))
    report = InsertOnline((OUT, DOWN)).run(nothing)
    assert report.edits == []
    assert [what for what, _ in report.skipped] == [OUT, DOWN]


def test_inputs_that_come_rotated_are_left_alone_and_say_so() -> None:
    report = InsertOnline((QUERY, DOWN)).run(context(tiny.make("qwen3"), "qwen3"))
    assert report.skipped == [(QUERY, "its input already comes rotated")]
    assert len(report.edits) == 1
    plain = InsertOnline((DOWN,)).run(context(tiny.make("qwen3"), "qwen3", load_recipe("rtn")))
    assert plain.skipped == [(DOWN, "the recipe does not rotate")]


def rounded(linear: nn.Linear) -> BinaryWeight:
    signs, scale = round_signs(linear.weight.detach())
    return BinaryWeight(signs[None], scale[None])


def test_quantized_linears_hold_what_was_fitted_and_twice_is_once() -> None:
    model = tiny.make("qwen2")  # its q/k/v have biases
    ctx = context(model, "qwen2")
    linear = model.get_submodule(QUERY)
    weight, bias = rounded(linear), linear.bias.detach().clone()
    step = QuantizeLinears({QUERY: weight}, {QUERY: 16})
    report = run_pass(model, step, ctx)
    packed = model.get_submodule(QUERY)
    assert [what for what, _ in report.changed] == [QUERY]
    assert isinstance(packed, PackedLinear)
    assert type(model.get_submodule(DOWN)) is nn.Linear
    x = torch.randn(5, 64)
    # scales are stored in float16: 2^-11 of each
    torch.testing.assert_close(packed(x), x @ weight.dense().T + bias, rtol=2e-3, atol=2e-3)
    again = step.run(ctx)
    assert again.edits == []
    assert again.skipped == [(QUERY, "already packed")]


@pytest.mark.parametrize(
    ("name", "head"), [("llama-tied", TiedHead), ("gpt2", TiedHead), ("llama", EndLinear), ("gemma2", TiedHead)]
)
def test_ends_become_int8_and_tied_ones_share_their_codes(name: str, head: type) -> None:
    model = tiny.make(name)
    ctx = context(model, name)
    before = logits(model)
    for step in folding_passes(ctx.recipe):
        run_pass(model, step, ctx)
    report = run_pass(model, QuantizeEnds(rotated=True), ctx)
    assert len(report.changed) == 2
    assert isinstance(model.get_input_embeddings(), EndEmbedding)
    assert type(model.get_output_embeddings()) is head
    # int8 by row leaves about 1 % of a Gaussian row, and the tiny models amplify it
    assert relative(logits(model), before) < 0.08


class Scaled(nn.Embedding):
    """What transformers' scaled word embeddings are."""

    embed_scale = 8.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.embed_scale


class Normed(Scaled):
    """Does more than its rows and a number say."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


def test_embeddings_that_do_more_than_look_up_and_scale_are_told_apart() -> None:
    assert is_embedding(nn.Embedding(5, 4))
    assert is_embedding(Scaled(5, 4))
    assert not is_embedding(Normed(5, 4))
    assert not is_embedding(nn.Embedding(5, 4, max_norm=1.0))  # renormalizes what it looks up
    assert not is_embedding(nn.Linear(5, 4))


@pytest.mark.parametrize(("table", "kept"), [(Scaled, False), (Normed, True)])
def test_a_tied_embedding_keeps_what_it_does_beside_looking_up(table: type[nn.Embedding], kept: bool) -> None:
    model = tiny.make("llama-tied")
    model.model.embed_tokens = table(128, 64)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False)
    before = model.model.embed_tokens(tiny.ids())
    report = run_pass(model, QuantizeEnds(rotated=False), context(model, "llama-tied"))
    assert isinstance(model.model.embed_tokens, table if kept else EndEmbedding)
    assert type(model.lm_head) is (EndLinear if kept else TiedHead)
    assert relative(model.model.embed_tokens(tiny.ids()), before) < 0.01  # int8 by row
    assert kept == ("model.embed_tokens" in {what for what, _ in report.skipped})


def test_ends_can_be_stored_apart_or_left_alone() -> None:
    model = tiny.make("llama-tied")
    ctx = context(model, "llama-tied", load_recipe("bwla-w1a6", {"tied": "untie"}))
    for step in folding_passes(ctx.recipe):
        run_pass(model, step, ctx)
    run_pass(model, QuantizeEnds(rotated=True), ctx)
    assert type(model.get_output_embeddings()) is EndLinear
    whole = load_recipe("bwla-w1a6", {"head.bits": 16})
    kept = QuantizeEnds(rotated=False).run(context(tiny.make("llama"), "llama", whole))
    assert kept.edits == []
    assert {what for what, _ in kept.skipped} == {"model.embed_tokens", "lm_head"}


def test_ends_of_4_bits_by_the_recipe_and_by_name() -> None:
    model = tiny.make("llama-tied")
    ctx = context(model, "llama-tied", load_recipe("bwla-w1a6", {"head.bits": 4, "head.group_size": 32}))
    before = logits(model)
    for step in folding_passes(ctx.recipe):
        run_pass(model, step, ctx)
    run_pass(model, QuantizeEnds(rotated=True), ctx)
    assert model.model.embed_tokens.coding == Coding(4, 32)
    assert type(model.lm_head) is TiedHead
    # int4 by 32 leaves 8 % of a Gaussian row, of the embedding and of the head, and the tiny models amplify it
    assert relative(logits(model), before) < 0.5
    other = tiny.make("llama")
    own = [{"pattern": "lm_head", "set": {"head.bits": 4}}]
    run_pass(other, QuantizeEnds(rotated=False), context(other, "llama", load_recipe("bwla-w1a6", {"overrides": own})))
    assert (other.model.embed_tokens.coding, other.lm_head.coding) == (Coding(), Coding(4, 64))


def test_a_head_that_is_no_longer_the_embedding_is_stored_on_its_own() -> None:
    model = tiny.make("llama-tied")
    ctx = context(model, "llama-tied")
    for step in folding_passes(ctx.recipe):
        run_pass(model, step, ctx)
    with torch.no_grad():
        model.lm_head.weight[3] *= -1
    report = run_pass(model, QuantizeEnds(rotated=True), ctx)
    assert type(model.lm_head) is EndLinear
    assert ("lm_head", "no longer the embedding times a gain: stored twice") in report.skipped

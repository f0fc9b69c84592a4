"""The exact passes: untie, fold-norms, fold-rotations."""

import pytest
import torch
from torch import nn

from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.passes.apply import apply_module
from bwla_compiler.passes.base import PassContext, RotateParameter
from bwla_compiler.passes.fold_norms import FoldNorms
from bwla_compiler.passes.fold_rotations import FoldRotations, residual_rotation
from bwla_compiler.passes.pipeline import run_pass
from bwla_compiler.passes.untie import Untie
from bwla_compiler.recipe import load_recipe
from tests import planned, tiny
from tests.planned import exact_logits as logits
from tests.wider import wider

EXACT = 1e-12
"""Relative logit error in float64: rounding is about 1e-15 a layer, a fold in the wrong place 1e-2 or more."""


def context(model: nn.Module, name: str = "", *, seed: int = 0) -> PassContext:
    """Return what passes need; name: of the tiny model that this is, for its plan to be made once."""
    return PassContext(model, planned.plan(name) if name else make_plan(model), load_recipe("bwla-w1a6"), seed)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def llama() -> nn.Module:
    return tiny.make("llama-tied", dtype=torch.float64)


def test_untie_gives_the_head_its_own_weight(llama: nn.Module) -> None:
    ctx = context(llama, "llama-tied")
    before = logits(llama)
    report = run_pass(llama, Untie(), ctx)
    assert [what for what, _ in report.changed] == ["lm_head"]
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight
    assert not llama.config.tie_word_embeddings
    assert error(logits(llama), before) == 0


def test_untie_twice_is_once(llama: nn.Module) -> None:
    ctx = context(llama, "llama-tied")
    run_pass(llama, Untie(), ctx)
    report = run_pass(llama, Untie(), ctx)
    assert report.edits == []
    assert report.skipped == [("lm_head", "already has a tensor of its own")]


@pytest.mark.parametrize("name", ["gpt2", *wider("llama", "gemma2")])
def test_fold_norms_moves_the_gains_and_changes_nothing(name: str) -> None:
    model = tiny.make(name, dtype=torch.float64)
    ctx = context(model, name)
    before = logits(model)
    run_pass(model, Untie(), ctx)
    report = run_pass(model, FoldNorms(), ctx)
    assert report.changed
    for norm in ctx.plan.norms:
        if norm.absorbed_by and norm.gain:
            assert bool((model.get_parameter(norm.gain) == 1 - norm.gain_offset).all())
            assert norm.gain_offset == (1.0 if name == "gemma2" else 0.0)
        if norm.absorbed_by and norm.shift:
            assert not model.get_parameter(norm.shift).any()
    assert error(logits(model), before) < EXACT


def test_fold_norms_leaves_post_norms_alone_and_says_why() -> None:
    model = tiny.make("gemma2", dtype=torch.float64)
    report = FoldNorms().run(context(model, "gemma2"))
    skipped = dict(report.skipped)
    name = "model.layers.0.post_attention_layernorm.weight"
    assert "read by add" in skipped[name]


def test_fold_norms_twice_is_once() -> None:
    model = tiny.make("opt", dtype=torch.float64)
    ctx = context(model, "opt")
    run_pass(model, Untie(), ctx)
    run_pass(model, FoldNorms(), ctx)
    assert FoldNorms().run(ctx).edits == []


@pytest.mark.parametrize(
    "name, kind",
    [
        ("qwen3", "haar"),
        ("gpt2", "hadamard"),
        pytest.param("qwen3", "hadamard", marks=pytest.mark.exhaustive),
        pytest.param("gpt2", "haar", marks=pytest.mark.exhaustive),
        pytest.param("phi3", "haar", marks=pytest.mark.exhaustive),
        pytest.param("phi3", "hadamard", marks=pytest.mark.exhaustive),
    ],
)
def test_fold_rotations_turns_weights_and_changes_nothing(name: str, kind: str) -> None:
    model = tiny.make(name, dtype=torch.float64)
    ctx = context(model, name)
    before = logits(model)
    embedding = model.get_input_embeddings().weight.detach().clone()
    for step in (Untie(), FoldNorms(), FoldRotations(kind=kind, every=True)):  # type: ignore[arg-type]
        run_pass(model, step, ctx)
    assert float((model.get_input_embeddings().weight - embedding).norm() / embedding.norm()) > 0.5
    assert error(logits(model), before) < EXACT


def test_fold_rotations_needs_the_norms_folded_first() -> None:
    """The negative control: with gains in place the same rotations are wrong, so the comparison can fail."""
    model = tiny.make("llama", dtype=torch.float64)
    before = logits(model)
    run_pass(model, FoldRotations(kind="haar", every=True), context(model, "llama"))
    assert error(logits(model), before) > 1e-3


def test_one_reader_turned_the_wrong_way_is_seen() -> None:
    model = tiny.make("llama", dtype=torch.float64)
    ctx = context(model, "llama")
    before = logits(model)
    run_pass(model, FoldNorms(), ctx)
    run_pass(model, FoldRotations(kind="haar"), ctx)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.copy_(weight.flip(1))
    assert error(logits(model), before) > 1e-3


def test_fold_rotations_leaves_pinned_and_unread_bases_alone() -> None:
    model = tiny.make("opt", dtype=torch.float64)
    ctx = context(model, "opt")
    report = FoldRotations().run(ctx)
    skipped = dict(report.skipped)
    assert "relu" in skipped["model.decoder.layers.0.fc2.input"]
    assert skipped["model.decoder.layers.0.self_attn.q_proj"] == "no linear reads it: nothing to gain"
    rotated = {edit.parameter for edit in report.edits if isinstance(edit, RotateParameter)}
    assert "model.decoder.embed_positions.weight" in rotated


def test_the_residual_can_be_left_out() -> None:
    model = tiny.make("llama", dtype=torch.float64)
    report = FoldRotations(residual=False).run(context(model, "llama"))
    assert all("embed_tokens" not in edit.parameter for edit in report.edits if isinstance(edit, RotateParameter))
    assert report.edits  # v_proj and o_proj still turn


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_residual_rotation_is_orthogonal_and_undone(name: str) -> None:
    model = tiny.make(name)
    ctx = context(model, name)
    rotation = residual_rotation(ctx, ctx.plan.basis("residual"))
    matrix = rotation.matrix(64)
    # float64 products of 64 terms
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-12)
    rows = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(rows), rows @ matrix.T)
    torch.testing.assert_close(rotation.undo(rotation.apply(rows)), rows)
    if name == "gpt2":
        ones = torch.ones(64, dtype=torch.float64)
        torch.testing.assert_close(matrix @ ones, ones)


def test_seeds_differ_and_repeat() -> None:
    model = tiny.make("llama")
    plan: Plan = planned.plan("llama")
    recipe = load_recipe("bwla-w1a6")
    first, again, other = (
        residual_rotation(PassContext(model, plan, recipe, seed), plan.basis("residual")).matrix(64)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Normed(nn.Module):
    """ids -> embedding -> a LayerNorm with a shift -> a linear without a bias -> a linear, and a residual around."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(128, 12)
        self.norm = nn.LayerNorm(12)
        self.first = nn.Linear(12, 10, bias=False)
        self.second = nn.Linear(10, 12)
        self.head = nn.Linear(12, 128)
        nn.init.normal_(self.norm.bias)
        nn.init.normal_(self.norm.weight)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.second(self.first(self.norm(x))))


class Routed(Normed):
    """The same, with another reader of the norm that holds a weight and would never look at a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Module()
        self.router.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)
        normed = self.norm(x)
        return self.head(x + self.second(self.first(normed)) + nn.functional.linear(normed, self.router.weight))


def test_a_bias_that_a_shift_has_made_turns_with_its_linear() -> None:
    model = Normed().to(torch.float64)
    ctx = context(model)
    before = logits(model)
    assert "first" in {basis.name for basis in ctx.plan.free}
    run_pass(model, FoldNorms(), ctx)
    assert model.first.bias is not None
    report = run_pass(model, FoldRotations(kind="haar", every=True), ctx)
    assert "first.bias" in {e.parameter for e in report.edits if isinstance(e, RotateParameter)}
    assert error(logits(model), before) < EXACT


def test_left_unturned_it_would_change_the_logits() -> None:
    model = Normed().to(torch.float64)
    ctx = context(model)
    before = logits(model)
    run_pass(model, FoldNorms(), ctx)
    edits = FoldRotations(kind="haar", every=True).run(ctx).edits
    apply_module(model, [e for e in edits if getattr(e, "parameter", "") != "first.bias"])
    assert error(logits(model), before) > 1e-2


def test_a_shift_stays_where_a_reader_takes_no_bias() -> None:
    model = Routed().to(torch.float64)
    ctx = context(model)
    before = logits(model)
    (norm,) = ctx.plan.norms
    assert norm.absorbed_by == ()
    assert "takes no bias" in norm.reason
    for step in (FoldNorms(), FoldRotations(kind="haar", every=True)):
        run_pass(model, step, ctx)
    assert error(logits(model), before) < EXACT

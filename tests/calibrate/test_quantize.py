import pytest
import torch
from torch import nn

from bwla_compiler.calibrate import quantize
from bwla_compiler.calibrate.quantize import BATCH, quantize_model
from bwla_compiler.calibrate.report import QuantizeReport
from bwla_compiler.errors import PlanError, WeightError
from bwla_compiler.graph.capture import capture
from bwla_compiler.recipe import Recipe, load_recipe
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, PackedLinear, SimulatedLinear, TiedHead
from tests import planned, tiny
from tests.wider import wider

FAST = {"transform.iterations": 3, "psp.iterations": 1, "signs.sweeps": 2, "tuning.steps": 0}


def recipe(name: str = "bwla-w1a6", **changes: object) -> Recipe:
    return load_recipe(name, FAST | {k.replace("__", "."): v for k, v in changes.items()})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.ids(seed=9)).logits


def tokens() -> torch.Tensor:
    return tiny.ids(batch=48, length=32, seed=5)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def fit(model: nn.Module, name: str, recipe: Recipe, batches: torch.Tensor | None, *, seed: int = 0) -> QuantizeReport:
    """Quantize `tiny.make(name)` by a plan and a graph that all tests share."""
    graph = planned.graph(name, batch=BATCH, length=tokens().shape[1])
    return quantize_model(model, recipe, batches, plan=planned.plan(name), graph=graph, seed=seed)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", *wider("phi3")])
def test_every_block_linear_is_packed_and_the_fit_beats_rounding(name: str) -> None:
    reference = logits(tiny.make(name))
    rounded, fitted = tiny.make(name), tiny.make(name)
    fit(rounded, name, recipe("rtn"), None)
    report = fit(fitted, name, recipe(), tokens())
    packed = {n for n, m in fitted.named_modules() if isinstance(m, PackedLinear)}
    assert packed == {x.name for x in report.linears} == {x.name for x in report.plan.linears if x.block}
    assert isinstance(fitted.get_input_embeddings(), EndEmbedding)
    assert isinstance(fitted.get_output_embeddings(), (EndLinear, TiedHead))
    # random weights have no structure to fit: on a trained model the error falls many times over
    assert relative(logits(fitted), reference) < 0.85 * relative(logits(rounded), reference)


def test_reports_name_errors_bits_and_transforms() -> None:
    report = fit(tiny.make("llama"), "llama", recipe(), tokens())
    by_name = {x.name: x for x in report.linears}
    down = by_name["model.layers.0.mlp.down_proj"]
    assert (down.decision, down.transform) == ("online", "kronecker")
    assert by_name["model.layers.0.self_attn.q_proj"].transform == "folded"
    assert all(0 < x.output_error < x.weight_error < 1.5 for x in report.linears)
    assert all(1 < x.true_bits < 4 for x in report.linears)
    n_weights = sum(x.in_features * x.out_features for x in report.plan.linears if x.block)
    expected = sum(x.true_bits * report.plan.linear(x.name).in_features * report.plan.linear(x.name).out_features
                   for x in report.linears) / n_weights  # fmt: skip
    assert report.bits.linears == pytest.approx(expected)
    assert {p.name for p in report.passes} >= {"fold-norms", "fold-rotations", "insert-online", "quantize-linears"}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    states = []
    for seed in (0, 0, 1):
        model = tiny.make("qwen3")
        fit(model, "qwen3", recipe(), tokens(), seed=seed)
        states.append(model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert any(not torch.equal(v, states[2][k]) for k, v in states[0].items())


def test_without_calibration_the_weights_alone_are_fitted() -> None:
    model = tiny.make("llama")
    report = fit(model, "llama", recipe(), None)
    assert all(x.weight_error == pytest.approx(x.output_error, rel=1e-4) for x in report.linears)
    assert torch.isfinite(logits(model)).all()


def test_an_input_that_is_always_zero_tells_nothing_and_stops_nothing() -> None:
    model = tiny.make("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").zero_()
    reference = logits(model)
    fit(model, "llama", recipe(), tokens())
    assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), PackedLinear)
    assert torch.isfinite(logits(model)).all()
    assert relative(logits(model), reference) < 1


def test_residual_online_puts_a_transform_in_every_group() -> None:
    model = tiny.make("llama")
    report = fit(model, "llama", recipe(residual="online"), tokens())
    assert {x.transform for x in report.linears} == {"kronecker"}


@pytest.mark.exhaustive
def test_a_second_plane_lowers_the_error_and_costs_a_bit() -> None:
    one, two = (
        quantize_model(tiny.make("llama"), recipe(weights__planes=planes, psp__hidden_over=0), tokens())
        for planes in (1, 2)
    )
    assert two.bits.linears > one.bits.linears + 0.9
    assert sum(x.output_error for x in two.linears) < 0.6 * sum(x.output_error for x in one.linears)


def test_overrides_keep_linears_and_are_counted() -> None:
    keep = {"overrides": [{"pattern": "*.layers.0.*", "keep": True}]}
    model = tiny.make("llama")
    report = fit(model, "llama", load_recipe("bwla-w1a6", FAST | keep), tokens())
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert isinstance(model.model.layers[1].mlp.up_proj, PackedLinear)
    assert report.bits.linears > 16  # half of the weights are still float32
    skipped = {what for p in report.passes for what, reason in p.skipped if "override" in reason}
    assert "model.layers.0.mlp.up_proj" in skipped


def test_bad_weights_leave_the_model_as_it_was() -> None:
    model = tiny.make("llama")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        quantize_model(model, recipe(), tokens())
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(PlanError, match="no linears"):
        quantize_model(_Bare(), recipe(), None)


class _Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return self.embed(input_ids)


@pytest.mark.parametrize("name", ["llama-tied", *wider("llama")])
def test_a_graph_that_fits_spares_a_capture_and_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, spared = tiny.make(name), tiny.make(name)
    graph = capture(tiny.make(name), batch=BATCH, length=tokens().shape[1])
    plan = quantize_model(plain, recipe(), tokens()).plan
    monkeypatch.setattr(quantize, "capture", lambda *a, **kw: pytest.fail("captured again"))
    quantize_model(spared, recipe(), tokens(), plan=plan, graph=graph)
    for key, value in plain.state_dict().items():
        assert torch.equal(spared.state_dict()[key], value), key


@pytest.mark.exhaustive
def test_a_graph_of_another_shape_is_not_used() -> None:
    plain, given = tiny.make("llama"), tiny.make("llama")
    plan = fit(plain, "llama", recipe(), tokens()).plan
    quantize_model(given, recipe(), tokens(), plan=plan, graph=planned.graph("llama", batch=3, length=11))
    assert torch.equal(logits(given), logits(plain))


def test_the_paper_rotates_every_input_online_and_carries_row_means_and_column_scales() -> None:
    model = tiny.make("qwen3")
    report = fit(model, "qwen3", recipe("bwla-paper"), None)
    assert {x.transform for x in report.linears} == {"kronecker"}
    down = model.model.layers[0].mlp.down_proj
    assert down.spec.scale_kind == "row+column"
    assert down.rank == 16 + 1
    assert (down.transform.spec.left, down.transform.spec.right) == (True, True)


@pytest.mark.exhaustive
def test_folded_alone_computes_nothing_online_and_groups_its_scales() -> None:
    model = tiny.make("llama")
    report = quantize_model(model, recipe("bwla-folded"), tokens())
    assert all(m.transform is None for m in model.modules() if isinstance(m, PackedLinear))
    assert {x.transform for x in report.linears} == {"folded", "none"}
    plain = quantize_model(tiny.make("llama"), recipe("rtn", activations__bits=16), None)
    assert sum(x.output_error for x in report.linears) < sum(x.output_error for x in plain.linears)


@pytest.mark.parametrize("name", ["billm-like", *wider("arb-like")])
def test_simulated_recipes_count_what_they_would_store(name: str) -> None:
    model = tiny.make("llama")
    report = fit(model, "llama", recipe(name), tokens())
    linear = model.model.layers[0].mlp.down_proj
    assert isinstance(linear, SimulatedLinear)
    scales = (4 if name == "billm-like" else 8) * 16 * linear.out_features
    expected = 2 + (scales + linear.in_features) / (linear.in_features * linear.out_features)
    by_name = {x.name: x for x in report.linears}
    # each linear's bits are rounded up to whole bytes
    assert by_name["model.layers.0.mlp.down_proj"].true_bits == pytest.approx(expected, abs=1e-2)

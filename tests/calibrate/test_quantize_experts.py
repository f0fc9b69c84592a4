"""Models with experts, quantized whole: bytes, fits, files, and what is told of the tokens."""

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from bwla_compiler import api
from bwla_compiler.calibrate.report import QuantizeReport
from bwla_compiler.evaluate.verification import verify_rotations
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.passes.base import PassContext
from bwla_compiler.passes.insert_online import InsertOnline
from bwla_compiler.passes.pipeline import run_pass
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.modules import PackedExperts
from bwla_compiler.zoo.models import tiny_model
from tests import tiny
from tests.wider import wider

FAST = {"transform.iterations": 2, "psp.iterations": 1, "signs.sweeps": 1}
OTHERS = ("qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "llama4_text", "nemotron_h")
FAMILIES = ["gpt_oss", *wider("mixtral", *OTHERS)]
"""With biases, transposed and interleaved; plain; the others are the same code with other gates and routers."""


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.ids(seed=4), use_cache=False).logits


@pytest.fixture(scope="module")
def mixtral() -> tuple[nn.Module, nn.Module, QuantizeReport]:
    """A float model, its calibrated copy and the report; the last expert of the first layer gets no token."""
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[3] = 0
        model.model.layers[0].mlp.gate.weight[:3] *= 100  # of three random signs, two are above zero or below
    packed = copy.deepcopy(model)
    report = api.quantize(packed, settings=FAST, calibration=tiny.ids(batch=16, length=24, seed=3))
    return model, packed, report


def expected_bytes(module: PackedExperts) -> int:
    """Return the bytes of experts from sizes alone."""
    e, n, m, rank = module.n_experts, module.in_features, module.out_features, module.spec.rank
    found = e * m * -(-n // 8) + 2 * e * m + 1  # signs, row scales in float16, their power of two
    found += e * rank * (n + m + 2) + 1 if rank else 0  # int8 pair, scales, their power
    t = module.spec.transform
    sizes = (t.scaled * t.n1 * t.n2, t.left * t.n1**2, t.right * (t.n2 if t.signed else t.n2**2))
    return found + sum(2 * size + 1 for size in sizes if size)


def test_every_byte_of_the_experts_is_counted(
    mixtral: tuple[nn.Module, nn.Module, QuantizeReport], tmp_path: Path
) -> None:
    model, packed, report = mixtral
    experts = {name: m for name, m in packed.named_modules() if isinstance(m, PackedExperts)}
    assert set(experts) == {name for name, p in model.named_parameters() if p.ndim == 3}
    assert not any(p.ndim == 3 for p in packed.parameters())
    packed.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    on_disk = {n: sum(t.nbytes for k, t in stored.items() if k.startswith(f"{n}.")) for n in experts}
    assert on_disk == {name: expected_bytes(module) for name, module in experts.items()}
    for linear in report.linears:
        if linear.name in experts:
            weights = report.plan.linear(linear.name).n_weights
            assert linear.true_bits == pytest.approx(8 * on_disk[linear.name] / weights)
            assert linear.true_bits < 2


def test_the_meter_counts_routers_and_float_experts_as_they_are_stored(
    mixtral: tuple[nn.Module, nn.Module, QuantizeReport],
) -> None:
    model, _, report = mixtral
    assert api.bits(model).linears == 32  # float32, experts and routers among them
    linears = [x for x in report.plan.linears if x.block]
    by_name = {x.name: x.true_bits for x in report.linears}
    stored = sum(by_name.get(x.name, 32.0) * x.n_weights for x in linears)
    assert {x.name for x in linears} - set(by_name) == {f"model.layers.{i}.mlp.gate" for i in range(2)}
    assert report.bits.linears == pytest.approx(stored / sum(x.n_weights for x in linears))


def test_the_report_tells_the_tokens_of_each_expert(mixtral: tuple[nn.Module, nn.Module, QuantizeReport]) -> None:
    *_, report = mixtral
    tokens = {x.name: x.tokens for x in report.linears if x.tokens is not None}
    assert len(tokens) == 4
    for found in tokens.values():
        assert sum(found.counts) == 2 * 16 * 24  # two experts a token
        assert found.blended == sum(n < found.floor for n in found.counts)
        assert found.alike > 0.5
    assert '"counts"' in report.to_json()


def test_the_fit_beats_rounding_on_the_experts(mixtral: tuple[nn.Module, nn.Module, QuantizeReport]) -> None:
    model, packed, report = mixtral
    rounded = copy.deepcopy(model)
    api.quantize(rounded, recipe="rtn")
    ids = tiny.ids(batch=64, length=24, seed=4)  # of few tokens chance decides
    with torch.no_grad():
        reference, fitted, plain = (m(ids, use_cache=False).logits for m in (model, packed, rounded))
    assert (fitted - reference).norm() < 0.9 * (plain - reference).norm()
    experts = [x for x in report.linears if x.tokens is not None]
    assert all(0 < x.output_error < x.weight_error < 1 for x in experts)


@pytest.mark.exhaustive
def test_an_expert_without_a_token_still_has_finite_weights() -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # equal scores: the first two experts get all tokens
    report = api.quantize(model, settings=FAST, calibration=tiny.ids(batch=8, length=16, seed=3))
    counts = [x.tokens.counts for x in report.linears if x.tokens is not None]
    assert all(sorted(found) == [0, 0, 128, 128] for found in counts)
    assert logits(model).isfinite().all()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert logits(model).isfinite().all()  # now the others are asked


@pytest.mark.parametrize("recipe", ["rtn", *wider("bwla-w1a6")])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_reload_gives_bit_equal_logits(name: str, recipe: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    settings = FAST if recipe != "rtn" else None
    api.quantize(model, recipe=recipe, settings=settings, calibration=tiny.ids(batch=8, length=16, seed=3))
    assert not [n for n, p in model.named_parameters() if p.ndim == 3 and "experts" in n]
    api.save(model, tmp_path)
    again = api.load(tmp_path).model
    assert torch.equal(logits(again), logits(model))
    assert api.bits(again) == api.bits(model)
    api.save(again, tmp_path / "again")
    assert torch.equal(logits(api.load(tmp_path / "again").model), logits(model))


@pytest.mark.parametrize("name", ["mixtral", *wider("gpt_oss")])
def test_online_transforms_change_nothing(name: str) -> None:
    model = tiny_model(name)
    expected = logits(model)
    plan = make_plan(model)
    recipe = load_recipe("bwla-w1a6", {**FAST, "transform.kind": "hadamard"})
    step = InsertOnline(tuple(g.name for g in plan.groups))
    report = run_pass(model, step, PassContext(model, plan, recipe))
    assert any("experts.down_proj" in what for what, _ in report.changed)
    # transforms are float32; the inverse in the weights is that of the stored factors
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_an_override_keeps_one_weight_of_the_experts(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    settings = {"overrides": [{"pattern": "*experts.down_proj", "keep": True}]}
    recipe = load_recipe("rtn", settings)
    report = api.quantize(model, recipe=recipe)
    kept = [n for n, p in model.named_parameters() if p.ndim == 3]
    assert kept == [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    skipped = dict(next(p for p in report.passes if p.name == "quantize-linears").skipped)
    assert all(skipped[name] == "an override keeps it as it is" for name in kept)
    assert report.bits.linears > 8  # a third of the experts' weights at 32 bits
    api.save(model, tmp_path)
    assert torch.equal(logits(api.load(tmp_path).model), logits(model))


@pytest.mark.parametrize("name", ["mixtral", *wider("gpt_oss")])
def test_rotations_stay_exact(name: str) -> None:
    assert verify_rotations(tiny_model(name)).passed

"""The observer: before and after of weights and inputs, from samples, without changing what quantizing does."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import bwla_compiler as bwla
from bwla_compiler.calibrate.observe import Observer
from bwla_compiler.calibrate.report import LinearReport, QuantizeReport, linear_report
from bwla_compiler.calibrate.residency import InMemory
from bwla_compiler.graph.plan import Plan
from tests import tiny


def with_outlier() -> nn.Module:
    """Return a tiny Llama of which one gain, and so one channel of q, k and v's input, is 60 times as large."""
    model = tiny.make("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.input_layernorm.weight")[5] = 60.0
    return model


@pytest.fixture(scope="module")
def report() -> QuantizeReport:
    settings = {"tuning.steps": 0, "signs.sweeps": 1, "transform.iterations": 5, "transform.right": "fitted"}
    return bwla.quantize(
        with_outlier(), recipe="bwla-w1a6", settings=settings, calibration=tiny.ids(batch=4, length=40)
    )


def of(report: QuantizeReport, short: str) -> LinearReport:
    return next(x for x in report.linears if x.name.endswith(short))


def test_an_outlier_channel_is_seen_before_and_is_gone_after(report: QuantizeReport) -> None:
    spread = of(report, "0.self_attn.q_proj").spread
    assert spread is not None
    assert spread.input_before is not None
    assert spread.input_after is not None
    assert spread.input_before.kurtosis > 2 * spread.input_after.kurtosis
    assert max(spread.input_before.channels) > 2 * max(spread.input_after.channels)
    assert spread.input_after.bits == 6


def test_fitted_transforms_make_weights_more_bimodal(report: QuantizeReport) -> None:
    spread = of(report, "1.mlp.down_proj").spread
    assert spread is not None
    assert spread.weight_before is not None
    assert spread.weight_after is not None
    assert spread.weight_after.bimodality > spread.weight_before.bimodality + 0.005


def test_without_calibration_weights_alone_are_seen() -> None:
    found = of(bwla.quantize(tiny.make("gpt2"), recipe="rtn", calibration="none"), "h.0.attn.c_attn").spread
    assert found is not None
    assert found.weight_before == found.weight_after  # rtn changes no basis; GPT-2 stores [in, out]
    assert (found.input_before, found.input_after) == (None, None)


def test_weights_on_meta_are_left_out() -> None:
    model = tiny.make("llama").to("meta")
    plan: Plan = bwla.plan(model)
    observer = Observer(plan, bits=16)
    InMemory(model).watch(observer.see_original)
    assert observer.spread(plan.linears[0]).weight_before is None
    assert observer.bits == 6


def test_what_was_seen_survives_the_record_of_a_block(report: QuantizeReport) -> None:
    for linear in report.linears:
        assert linear_report(json.loads(json.dumps(dataclasses.asdict(linear)))) == linear

"""Quantized beside float: divergence and agreement by hand, widths apart, one reading of the float model a batch."""

import math

import pytest
import torch
from torch import nn

from benchmarks.beside_float import beside_float, nats
from bwla_compiler.calibrate.quantize import BATCH, quantize_model
from bwla_compiler.evaluate.fidelity import fidelity
from bwla_compiler.evaluate.perplexity import perplexity
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.modules import set_activation_bits
from tests import tiny
from tests.evaluate.test_fidelity import Bigram

BITS = (16, 6, 4)


def test_figures_worked_by_hand() -> None:
    reference = Bigram(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]).log())
    model = Bigram(torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.2, 0.6], [0.2, 0.3, 0.5]]).log())
    windows = torch.tensor([[1, 2, 0], [2, 2, 1]])  # the last column is predicted, not read
    (found,) = beside_float(reference, model, windows, bits=(16,)).values()
    after_1 = 0.1 * math.log(1 / 2) + 0.7 * math.log(7 / 6)
    after_2 = 0.6 * math.log(3) + 0.1 * math.log(1 / 5)
    # float32 logarithms, here and below
    assert found.kl == pytest.approx((after_1 + 3 * after_2) / 4, rel=1e-5)
    assert found.top1 == 1 / 4  # after 1 both expect 2; after 2 one expects 0 and the other 2
    losses = [-(math.log(0.6) + math.log(0.2)) / 2, -(math.log(0.5) + math.log(0.3)) / 2]
    assert found.nats.tolist() == pytest.approx(losses, rel=1e-6)
    assert nats(model, windows).tolist() == found.nats.tolist()


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """A tiny model, and the same in one bit."""
    model = tiny.make("llama")
    quantize_model(model, load_recipe("rtn"), tiny.ids(batch=8, length=16))
    return tiny.make("llama"), model


def test_each_width_is_what_it_is_when_measured_alone(pair: tuple[nn.Module, nn.Module]) -> None:
    reference, model = pair
    windows = tiny.ids(batch=BATCH + 3, length=17, seed=5)
    found = beside_float(reference, model, windows, bits=BITS)
    assert len({figures.kl for figures in found.values()}) == len(BITS)
    for bits, figures in found.items():
        set_activation_bits(model, bits)
        alone = fidelity(reference, model, windows)
        assert figures.kl == pytest.approx(alone.kl, rel=1e-9)  # the order of float64 sums alone
        assert figures.top1 == alone.top1_agreement
        assert torch.equal(figures.nats, nats(model, windows))
        assert math.exp(figures.nats.mean()) == pytest.approx(perplexity(model, windows), rel=1e-9)


def test_the_float_model_reads_each_batch_once_for_all_widths(pair: tuple[nn.Module, nn.Module]) -> None:
    reference, model = pair
    read: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: read.append(name))
        for name, module in (("float", reference), ("packed", model))
    ]
    beside_float(reference, model, tiny.ids(batch=BATCH + 1, length=9), bits=BITS)
    for hook in hooks:
        hook.remove()
    assert read == ["float", "packed", "packed", "packed"] * 2


def test_a_model_beside_itself_is_as_near_as_can_be(pair: tuple[nn.Module, nn.Module]) -> None:
    reference, _ = pair
    found = beside_float(reference, reference, tiny.ids(batch=3, length=9), bits=(16,))[16]
    assert (found.kl, found.top1) == (0.0, 1.0)

"""Fidelity against values known by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bwla_compiler.errors import CalibrationError
from bwla_compiler.evaluate.fidelity import fidelity


class Bigram(nn.Module):
    """A model whose logits for the next token depend on the last one alone: table [vocabulary, vocabulary]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(vocab_size=table.shape[0])

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_a_model_is_faithful_to_itself() -> None:
    model = Bigram(torch.randn(5, 5))
    found = fidelity(model, model, torch.arange(12).view(3, 4) % 5)
    assert (found.kl, found.top1_agreement, found.n_tokens) == (0.0, 1.0, 9)


def test_a_value_worked_by_hand() -> None:
    reference = Bigram(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log())
    model = Bigram(torch.tensor([[0.25, 0.75], [0.75, 0.25]]).log())
    found = fidelity(reference, model, torch.tensor([[1, 1, 0]]), batch=1)  # only row 1 of the tables is read
    assert found.kl == pytest.approx(0.25 * math.log(1 / 3) + 0.75 * math.log(3), rel=1e-6)  # float32 logarithm
    assert found.top1_agreement == 0.0


@given(st.integers(0, 1000), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_divergence_is_not_negative_and_batches_do_not_change_it(seed: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (Bigram(torch.randn(6, 6, generator=generator)) for _ in range(2))
    tokens = torch.randint(0, 6, (5, 7), generator=generator)
    found = fidelity(first, second, tokens, batch=batch)
    assert found.kl >= 0
    assert found.kl == pytest.approx(fidelity(first, second, tokens, batch=5).kl, rel=1e-12)  # float64 sums
    assert 0 <= found.top1_agreement <= 1


def test_agreement_counts_tokens() -> None:
    table = torch.eye(4)
    other = table.clone()
    other[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    found = fidelity(Bigram(table), Bigram(other), torch.tensor([[0, 1, 2, 3, 0]]))
    assert found.top1_agreement == 0.75


def test_modes_come_back_and_tokens_are_checked() -> None:
    first, second = Bigram(torch.zeros(3, 3)).train(), Bigram(torch.zeros(3, 3)).eval()
    fidelity(first, second, torch.zeros(1, 3, dtype=torch.int64))
    assert first.training
    assert not second.training
    with pytest.raises(CalibrationError):
        fidelity(first, second, torch.full((1, 3), 9))

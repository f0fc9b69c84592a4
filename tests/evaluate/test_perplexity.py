"""Perplexity against values known by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bwla_compiler.errors import CalibrationError
from bwla_compiler.evaluate.perplexity import perplexity


class Bigram(nn.Module):
    """A model whose logits for the next token depend on the last one alone: table [vocabulary, vocabulary]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(vocab_size=table.shape[0])
        self.dropout = nn.Dropout(0.9)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


def sequences(n: int, length: int, vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 300), st.integers(1, 9), st.integers(2, 12))
@settings(deadline=None, max_examples=30)
def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(vocab_size: int, n: int, length: int) -> None:
    found = perplexity(Bigram(torch.zeros(vocab_size, vocab_size)), sequences(n, length, vocab_size))
    assert found == pytest.approx(vocab_size, rel=1e-6)  # float32 logarithm


def test_a_value_worked_by_hand() -> None:
    model = Bigram(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log())
    tokens = torch.tensor([[0, 1, 1], [1, 0, 0]])  # chances 1/2, 3/4; 1/4, 1/2
    expected = (1 / 2 * 3 / 4 * 1 / 4 * 1 / 2) ** (-1 / 4)
    assert perplexity(model, tokens) == pytest.approx(expected, rel=1e-6)  # float32 logarithm


def test_batches_do_not_change_the_value() -> None:
    model, tokens = Bigram(torch.randn(7, 7)), sequences(11, 9, 7)
    values = [perplexity(model, tokens, batch=batch) for batch in (1, 4, 64)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-12)  # float64 sums of the same float32 terms


def test_runs_in_eval_mode_and_gives_it_back() -> None:
    model = Bigram(torch.randn(7, 7, generator=torch.Generator().manual_seed(1))).train()
    tokens = sequences(4, 9, 7)
    found = perplexity(model, tokens)
    assert found == perplexity(model, tokens)  # dropout would make them differ
    assert model.training
    assert model.dropout.training
    assert model.table.grad is None


def test_a_certain_and_wrong_model_is_infinitely_perplexed() -> None:
    table = torch.full((2, 2), 0.0)
    table[:, 1] = 1e6
    assert perplexity(Bigram(table), torch.zeros(1, 4, dtype=torch.int64)) == math.inf


def test_nan_logits_give_nan() -> None:
    assert math.isnan(perplexity(Bigram(torch.full((2, 2), math.nan)), torch.zeros(1, 4, dtype=torch.int64)))


def test_progress_counts_sequences() -> None:
    seen: list[tuple[str, int, int]] = []
    perplexity(Bigram(torch.zeros(3, 3)), sequences(5, 4, 3), batch=2, progress=lambda *step: seen.append(step))
    assert seen == [("perplexity", 2, 5), ("perplexity", 4, 5), ("perplexity", 5, 5)]


@pytest.mark.parametrize("tokens", [torch.zeros(0, 4, dtype=torch.int64), torch.full((1, 4), 3), torch.zeros(1, 4)])
def test_unusable_tokens_are_refused(tokens: Tensor) -> None:
    with pytest.raises(CalibrationError):
        perplexity(Bigram(torch.zeros(3, 3)), tokens)

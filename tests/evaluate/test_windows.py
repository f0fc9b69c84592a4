"""Sliding windows: every token but the first counts once, with the context that is stated."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bwla_compiler.errors import CalibrationError
from bwla_compiler.evaluate.windows import _windows, windowed_perplexity


class Counter(nn.Module):
    """Predicts token (number of tokens read so far), surely, or uniformly past that; records what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(vocab_size=64)
        self.config.get_text_config = lambda: self.config
        self.read: list[int] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        self.read.append(input_ids.shape[1])
        return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 64))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 80), context=st.integers(2, 20), data=st.data())
def test_each_token_counts_once_with_its_context(n: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    counted = [0] * n
    for start, end, fresh in _windows(n, context, stride):
        assert end - start - 1 <= context
        for token in range(end - fresh, end):
            counted[token] += 1
            assert token - start >= min(token, context - stride + 1)  # tokens before it in its window
    assert counted == [0] + [1] * (n - 1)


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = Counter()
    found = windowed_perplexity(model, torch.arange(50), context=8, stride=4)
    assert math.isclose(found.perplexity, 64, rel_tol=1e-6)  # float32 logs
    assert (found.n_tokens, found.context, found.stride) == (49, 8, 4)
    assert max(model.read) == 8


def test_what_cannot_be_windowed() -> None:
    with pytest.raises(CalibrationError, match="stride <= context"):
        windowed_perplexity(Counter(), torch.arange(50), context=8, stride=9)
    with pytest.raises(CalibrationError, match="at least 2"):
        windowed_perplexity(Counter(), torch.arange(1), context=8)

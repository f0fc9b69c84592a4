"""Perplexity: exp of the mean cross entropy of the next token, exp(-1/N sum_t log p(x_t | x_<t))."""

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bwla_compiler.tokens import check, check_length, device_of, evaluating, vocabulary

Progress = Callable[[str, int, int], None]


def perplexity(model: nn.Module, tokens: Tensor, *, batch: int = 8, progress: Progress | None = None) -> float:
    """Return the model's perplexity on tokens [n, length + 1] int64: each predicts the next, all count alike.

    model: gives `.logits` [n, length, vocabulary]; run in eval mode without gradients, its modes restored.
    The sum is float64. inf or nan where the model's logits are. Raises CalibrationError for unusable tokens.
    """
    check(tokens, vocab_size=vocabulary(model))
    check_length(model, tokens.shape[1] - 1)
    device, total, done = device_of(model), 0.0, 0
    with evaluating(model):
        for rows in tokens.split(batch):
            logits = model(input_ids=rows[:, :-1].to(device)).logits
            for row_logits, row in zip(logits, rows[:, 1:].to(device), strict=True):  # bounds a large vocabulary's copy
                total += cross_entropy(row_logits.float(), row, reduction="none").double().sum().item()
            done += len(rows)
            if progress is not None:
                progress("perplexity", done, len(tokens))
    nats = total / tokens[:, 1:].numel()
    return math.exp(nats) if nats < 700 else nats * math.inf  # exp overflows; nan stays nan

"""Perplexity of one long stream by sliding windows: each token is predicted from as much context as the stride leaves.

Windows of `context` tokens start every `stride` tokens; of each, the tokens that no window before has predicted count.
With stride = context, windows stand side by side; with a smaller one every token has at least context - stride tokens
before it, and the figure is lower and dearer. Figures of different strides cannot be compared.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bwla_compiler.errors import CalibrationError
from bwla_compiler.tokens import check, check_length, device_of, evaluating, vocabulary

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Windowed:
    """perplexity: exp of the mean nats of the n_tokens that were predicted, with this context and stride."""

    perplexity: float
    n_tokens: int
    context: int
    stride: int


def windowed_perplexity(
    model: nn.Module, stream: Tensor, *, context: int, stride: int = 0, progress: Progress | None = None
) -> Windowed:
    """Return the perplexity of a stream [n_tokens] int64 by windows; stride 0 is the context.

    Every token but the first counts once. Sums are float64. Raises CalibrationError for a stream of less than two
    tokens, ids that the model does not know, or a stride that leaves gaps.
    """
    stride = stride or context
    if not (1 <= stride <= context and context >= 2):
        raise CalibrationError(f"windows of {context} tokens every {stride}: give 1 <= stride <= context, context >= 2")
    check(stream[None], vocab_size=vocabulary(model))
    device, total, counted = device_of(model), 0.0, 0
    windows = list(_windows(stream.numel(), context, stride))
    check_length(model, max(end - start for start, end, _ in windows) - 1)
    with evaluating(model):
        for done, (start, end, fresh) in enumerate(windows):
            ids = stream[start:end][None].to(device)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, -fresh:]
            nats = cross_entropy(logits.float(), ids[0, -fresh:], reduction="none")
            total, counted = total + nats.double().sum().item(), counted + fresh
            if progress is not None:
                progress("perplexity", done + 1, len(windows))
    mean = total / counted
    return Windowed(math.exp(mean) if mean < 700 else mean * math.inf, counted, context, stride)


def _windows(n_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, how many of the last tokens count) so that each token but the first counts once.

    A window reads end - start - 1 <= context tokens and predicts the one after each.
    """
    predicted = 1
    for start in range(0, n_tokens - 1, stride):
        end = min(start + context + 1, n_tokens)
        if end > predicted:
            yield start, end, end - predicted
            predicted = end
        if end == n_tokens:
            return

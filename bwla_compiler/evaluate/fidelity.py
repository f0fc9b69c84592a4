"""Fidelity: how near a model's next-token distributions are to those of its reference."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from bwla_compiler.tokens import check, device_of, evaluating, vocabulary

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Fidelity:
    """kl: mean KL(reference || model), nats per token. top1_agreement: fraction of tokens with the same argmax."""

    kl: float
    top1_agreement: float
    n_tokens: int


def fidelity(
    reference: nn.Module, model: nn.Module, tokens: Tensor, *, batch: int = 8, progress: Progress | None = None
) -> Fidelity:
    """Return the fidelity of the model to its reference on tokens [n, length + 1] int64 (the last column is unread).

    Both give `.logits` [n, length, vocabulary]; they may live on different devices. Sums are float64.
    Raises CalibrationError for unusable tokens.
    """
    check(tokens, vocab_size=vocabulary(reference))
    kl, agreed, done = 0.0, 0, 0
    with evaluating(reference), evaluating(model):
        for rows in tokens.split(batch):
            wanted = _logits(reference, rows)
            found = _logits(model, rows).to(wanted.device)
            for p, q in zip(wanted, found, strict=True):  # row by row: bounds a large vocabulary's copies
                divergences, same = token_fidelity(p.float().log_softmax(-1), q.float().log_softmax(-1))
                kl, agreed = kl + divergences.sum().item(), agreed + int(same.sum())
            done += len(rows)
            if progress is not None:
                progress("fidelity", done, len(tokens))
    n_tokens = tokens[:, 1:].numel()
    return Fidelity(kl=kl / n_tokens, top1_agreement=agreed / n_tokens, n_tokens=n_tokens)


def token_fidelity(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) of each token [n] float64, in nats, and whether both find the same token likeliest [n] bool.

    log_p, log_q [n, vocabulary]: log-probabilities of the next token, of the reference and of the model.
    """
    divergences = (log_p.exp() * (log_p - log_q)).double().sum(-1)
    return divergences, log_p.argmax(-1) == log_q.argmax(-1)


def _logits(model: nn.Module, rows: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=rows[:, :-1].to(device_of(model))).logits
    return logits

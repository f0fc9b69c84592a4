"""A quantized model beside its float model on the same windows, at several activation widths in one go.

The float model reads each batch once for all widths. Nothing is stored: what is held at a time are log-probabilities of
one batch, of either model BATCH x length x vocabulary x 4 bytes (16 MiB of the embedded model's windows).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bwla_compiler.calibrate.quantize import BATCH
from bwla_compiler.evaluate.fidelity import token_fidelity
from bwla_compiler.runtime.modules import set_activation_bits
from bwla_compiler.tokens import evaluating


@dataclass(frozen=True)
class Beside:
    """One width. nats [n] float64: the mean loss of each window, per token.

    kl: mean KL(float model || model), nats per token. top1: share of tokens after which both expect the same token,
    given the same text (teacher forced).
    """

    nats: Tensor
    kl: float
    top1: float


def beside_float(reference: nn.Module, model: nn.Module, windows: Tensor, *, bits: Sequence[int]) -> dict[int, Beside]:
    """Return what the model is beside its float model at each of these activation bits.

    windows [n, length + 1] int64. The model is left at the last of the bits. Sums are float64.
    """
    losses: dict[int, list[Tensor]] = {width: [] for width in bits}
    kl, agreed = dict.fromkeys(bits, 0.0), dict.fromkeys(bits, 0)
    with evaluating(reference), evaluating(model):
        for rows in windows.split(BATCH):
            wanted = log_probabilities(reference, rows)
            for width in bits:
                set_activation_bits(model, width)
                found = log_probabilities(model, rows)
                losses[width].append(window_nats(found, rows))
                for log_p, log_q in zip(wanted, found, strict=True):  # window by window: bounds the copies
                    divergences, same = token_fidelity(log_p, log_q)
                    kl[width] += divergences.sum().item()
                    agreed[width] += int(same.sum())
    n_tokens = windows[:, 1:].numel()
    return {width: Beside(torch.cat(losses[width]), kl[width] / n_tokens, agreed[width] / n_tokens) for width in bits}


def nats(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss of each window [n] float64, in nats per token. windows [n, length + 1] int64."""
    with evaluating(model):
        return torch.cat([window_nats(log_probabilities(model, rows), rows) for rows in windows.split(BATCH)])


def log_probabilities(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the model's log-probabilities [n, length, vocabulary] float32 of what follows rows [n, length + 1]."""
    found: Tensor = model(input_ids=rows[:, :-1]).logits.float().log_softmax(-1)
    return found


def window_nats(log_p: Tensor, rows: Tensor) -> Tensor:
    """Return the mean loss [n] float64 of rows [n, length + 1] under log-probabilities [n, length, vocabulary]."""
    return -log_p.gather(-1, rows[:, 1:, None])[..., 0].double().mean(1)

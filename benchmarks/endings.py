"""A task of held-out text that needs no download: which of four endings is the one that follows.

A question is PREFIX tokens of a held-out file, the ENDING tokens that follow there, and three times as many from other
held-out files. The model takes the ending of the highest mean log-likelihood per token; as all are equally long, length
decides nothing. Chance is one in four.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bwla_compiler.tokens import evaluating

PREFIX, ENDING, CHOICES = 16, 8, 4
QUESTIONS = 256
"""At most: an accuracy about one half has then a standard deviation of 3%; one is read to that, and no finer."""

BATCH = 16
"""Questions that are read at a time, each as CHOICES sequences."""


@dataclass(frozen=True)
class Questions:
    """prefixes [n, prefix], endings [n, CHOICES, ending] int64; answers [n]: the number of the ending that follows."""

    prefixes: Tensor
    endings: Tensor
    answers: Tensor


def questions_of(windows: Tensor, files: Tensor, *, seed: int = 0) -> Questions | None:
    """Return at most QUESTIONS questions drawn by a seed; None where the text has too few files for any.

    windows [n, length] int64 of held-out text; files [n] the number of each one's file.
    """
    width = PREFIX + ENDING
    if windows.shape[1] < width:
        return None
    cut = windows.unfold(1, width, width)
    spans, owners = cut.flatten(0, 1), files.repeat_interleave(cut.shape[1])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(spans), generator=generator)[:QUESTIONS]
    endings, answers = [], torch.randint(0, CHOICES, (len(chosen),), generator=generator)
    for number, place in zip(chosen, answers.tolist(), strict=True):
        others = (owners != owners[number]).nonzero().flatten()
        if len(others) < CHOICES - 1:
            return None
        drawn = others[torch.randperm(len(others), generator=generator)[: CHOICES - 1]]
        order = torch.cat((drawn[:place], number[None], drawn[place:]))
        endings.append(spans[order, PREFIX:])
    return Questions(spans[chosen, :PREFIX], torch.stack(endings), answers)


def accuracy(model: nn.Module, questions: Questions) -> float:
    """Return the share of questions of which the model takes the ending that follows, 0 to 1."""
    taken = [
        _taken(model, prefixes, endings)
        for prefixes, endings in zip(questions.prefixes.split(BATCH), questions.endings.split(BATCH), strict=True)
    ]
    return float((torch.cat(taken) == questions.answers).double().mean())


def _taken(model: nn.Module, prefixes: Tensor, endings: Tensor) -> Tensor:
    """Return the number [n] of the ending that the model takes; the first of equals, and of NaN."""
    n, choices, length = endings.shape
    rows = torch.cat((prefixes[:, None].expand(n, choices, -1), endings), dim=-1).flatten(0, 1)
    with evaluating(model):
        logits = model(input_ids=rows[:, :-1]).logits[:, -length:].float()
    losses = cross_entropy(logits.flatten(0, 1), endings.flatten(), reduction="none")
    return losses.view(n, choices, length).double().mean(-1).argmin(-1)

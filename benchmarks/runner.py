"""What a contender's process does with a model, whoever computes it: a prompt, then single tokens, timed."""

import time
from abc import ABC, abstractmethod

import torch
from torch import Tensor

PAUSE_SECONDS = 0.01
"""Before a round: threads of the contender before may still wait for work by spinning."""


class Runner(ABC):
    """A loaded model; `ids` [1, prompt + steps] int64 are what all contenders read, whatever they predict.

    load_seconds: from its files to memory. n_bytes: of its weights. about: versions of what computes it.
    """

    def __init__(self, ids: Tensor, *, prompt: int) -> None:
        self.ids, self.prompt = ids, prompt
        self.load_seconds, self.n_bytes, self.about = 0.0, 0, ""

    @property
    def steps(self) -> int:
        """Tokens that are decoded one by one."""
        return self.ids.shape[1] - self.prompt

    @abstractmethod
    def prefill(self) -> Tensor:
        """Return the logits [1, prompt, vocabulary] of the prompt, read into an empty cache.

        What it and `step` return may be lent until the next call.
        """

    @abstractmethod
    def step(self, i: int) -> Tensor:
        """Return the logits [1, 1, vocabulary] of the i-th token after the prompt; its cache grows by it."""

    @torch.no_grad()
    def first(self) -> dict[str, float]:
        """Return the seconds of the first prefill and of the first decoded token, compiling included."""
        start = time.perf_counter()
        self.prefill()
        filled = time.perf_counter()
        self.step(0)
        return {"first_prefill_seconds": filled - start, "first_decode_seconds": time.perf_counter() - filled}

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Return the logits [prompt + steps, vocabulary] float32 that this way predicts with, prefill and decoded."""
        parts = [self.prefill()[0].to(torch.float32, copy=True)]
        parts += [self.step(i)[0].to(torch.float32, copy=True) for i in range(self.steps)]
        return torch.cat(parts)

    @torch.no_grad()
    def round(self) -> dict[str, float]:
        """Return seconds: from the prompt to the first token, of the prefill alone, and of a decoded token (mean)."""
        time.sleep(PAUSE_SECONDS)
        start = time.perf_counter()
        logits = self.prefill()
        filled = time.perf_counter()
        logits[0, -1].argmax().item()
        first = time.perf_counter()
        for i in range(self.steps):
            self.step(i)[0, -1].argmax().item()
        done = time.perf_counter()
        return {"first_token": first - start, "prefill": filled - start, "decode": (done - first) / self.steps}

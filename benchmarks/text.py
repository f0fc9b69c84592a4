"""Greedy text of a packed model, compiled against eager: after how many tokens they part, and how near the tie was."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bwla_compiler as bwla
from bwla_compiler.demo import demo_tokens

Progress = Callable[[str, int, int], None]

PROMPTS = 6
PROMPT_TOKENS = 16
NEW_TOKENS = 200


def measure(progress: Progress, *, prompts: int = PROMPTS) -> list[dict[str, Any]]:
    """Return a row per prompt of the embedded model's held-out text.

    equal_tokens: of 200, how many come before compiled and eager text part. gap: at that token, what separates the two
    best logits of the eager model, in standard deviations of its logits; None where the texts are equal.
    teacher_forced: share of all positions of the compiled text at which both rank the same token first.
    """
    loaded = bwla.load("demo:")
    bwla.quantize(loaded.model, recipe="bwla-w1a6", settings={"tuning.steps": 0}, tokenizer=loaded.tokenizer)
    eager: Any = loaded.model
    fast: Any = torch.compile(eager, backend="bwla")
    tokens = demo_tokens("test", sequences=prompts, length=PROMPT_TOKENS)[:, :PROMPT_TOKENS]
    rows = []
    for i, prompt in enumerate(tokens[:, None]):
        progress("greedy text", i, prompts)
        expected = _greedy(eager, prompt)
        found = _greedy(fast, prompt)
        rows.append({"prompt": i, **_compared(eager, fast, found, expected)})
    progress("greedy text", prompts, prompts)
    return rows


def _greedy(forward: Any, prompt: Tensor) -> Tensor:
    """Return the prompt with 200 tokens more, each the likeliest; int64 [1, length]."""
    text, ids, cache = prompt, prompt, None
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            out = forward(ids, past_key_values=cache, use_cache=True)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            text = torch.cat([text, ids], 1)
    return text


def _compared(eager: Any, fast: Any, found: Tensor, expected: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        ours, theirs = fast(found).logits[0], eager(found).logits[0]
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    parted = (found != expected)[0].nonzero()
    row = {"equal_tokens": NEW_TOKENS, "gap": None, "teacher_forced": same}
    if len(parted):
        at = int(parted[0, 0])
        best = theirs[at - 1].topk(2).values
        row |= {"equal_tokens": at - PROMPT_TOKENS, "gap": float((best[0] - best[1]) / theirs[at - 1].std())}
    return row

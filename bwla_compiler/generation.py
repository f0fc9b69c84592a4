"""Continuing a prompt, the text handed on as it is made."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from bwla_compiler.errors import CalibrationError, CheckpointError, WeightError
from bwla_compiler.tokens import check_length, device_of

COLDEST = 1e-4
"""Least temperature that logits are divided by: below, the likeliest token is as good as certain, and they overflow."""


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.7,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Return the model's continuation of a prompt, prompt left out; seeded sampling.

    temperature: of sampling among the 50 likeliest tokens; 0: always the likeliest.
    on_text: told of the text piece by piece, as soon as it is sure. Raises CheckpointError where there is no tokenizer,
    CalibrationError for a prompt without tokens or that is no UTF-8 and for more than the model has positions,
    WeightError for NaN logits.
    """
    if tokenizer is None:
        raise CheckpointError(
            "the model's folder has no tokenizer, so a prompt cannot be read; save one beside the model"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # arguments of a command may hold bytes that are none
        raise CalibrationError(f"prompt {prompt!r}: it is no UTF-8; give another one") from error
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if encoded.numel() == 0:
        raise CalibrationError(f"prompt {prompt!r}: the tokenizer makes no token of it; give another one")
    check_length(model, encoded.shape[1] + tokens - 1)  # the last one is not read
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": max(temperature, COLDEST), "top_k": 50}
    options["logits_processor"] = LogitsProcessorList([_Numbers()])
    if on_text is not None:
        options["streamer"] = _Pieces(tokenizer, on_text)
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(encoded.to(device_of(model)), **options)  # type: ignore[operator]
    return str(tokenizer.decode(out[0, encoded.shape[1] :], skip_special_tokens=True))


class _Numbers(LogitsProcessor):  # type: ignore[misc]
    """Stops where the model gives no numbers, of which any token would be the likeliest."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores. Raises WeightError."""
        if bool(scores.isnan().any()):
            raise WeightError("the model's logits are no numbers; its weights are damaged, or overflow its dtype")
        return scores


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands text on as soon as no later token can change it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece."""
        self.on_text(text)

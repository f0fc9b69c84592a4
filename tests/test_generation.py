"""Text that is continued: told as it is made, the likeliest at temperature 0, the same again by the same seed."""

from typing import Any

import pytest
import torch

import bwla_compiler as bwla
from bwla_compiler.errors import CalibrationError, WeightError
from tests import tiny
from tests.letters import letters


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make("llama")


def test_the_text_is_told_as_it_is_made(model: Any) -> None:
    made: list[int] = []
    handle = model.register_forward_hook(lambda *_: made.append(1))
    told: list[tuple[str, int]] = []
    tokenizer = letters()
    tokenizer.decode(tokenizer("a")["input_ids"])
    try:
        text = bwla.generate(
            model, tokenizer, "Once", tokens=8, seed=3, on_text=lambda piece: told.append((piece, len(made)))
        )
    finally:
        handle.remove()
    assert "".join(piece for piece, _ in told) == text
    assert len(text) == 8
    first = next(number for piece, number in told if piece)
    assert first < 8, "nothing was told before the last token was there"


def test_a_prompt_without_tokens_is_refused(model: Any) -> None:
    with pytest.raises(CalibrationError, match="prompt '': the tokenizer makes no token of it"):
        bwla.generate(model, letters(), "")


def test_a_prompt_that_is_no_utf_8_is_refused(model: Any) -> None:
    with pytest.raises(CalibrationError, match="it is no UTF-8"):
        bwla.generate(model, letters(), "the \udcff")  # as Python reads such an argument of a command


def test_next_to_no_temperature_takes_the_likeliest(model: Any) -> None:
    greedy, cold = (bwla.generate(model, letters(), "Once", tokens=8, temperature=t) for t in (0.0, 1e-40))
    assert cold == greedy


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_model_that_gives_no_numbers_is_told(temperature: float) -> None:
    damaged: Any = tiny.make("llama")
    damaged.lm_head.weight.data[3, 5] = torch.nan
    with pytest.raises(WeightError, match="logits are no numbers"):
        bwla.generate(damaged, letters(), "Once", temperature=temperature)


def test_temperature_0_takes_the_likeliest_and_a_seed_repeats_itself(model: Any) -> None:
    tokenizer = letters()
    ids = tokenizer("Once", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    greedy = {bwla.generate(model, tokenizer, "Once", tokens=8, temperature=0, seed=seed) for seed in (0, 1)}
    assert greedy == {tokenizer.decode(best, skip_special_tokens=True)}
    drawn = [bwla.generate(model, tokenizer, "Once", tokens=8, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]

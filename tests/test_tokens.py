"""Token batches: each source gives int64 rows of the length asked for, and each bad one a clear error."""

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bwla_compiler.errors import CalibrationError
from bwla_compiler.evaluate.perplexity import perplexity
from bwla_compiler.tokens import (
    calibration_tokens,
    check,
    evaluating,
    from_file,
    from_ids,
    from_texts,
    random_tokens,
    self_generated,
)
from tests import tiny


class Letters:
    """A tokenizer of one id per letter, 1 to 26; 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 96 for letter in text if letter.islower()]}


def tiny_model(vocab_size: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # a new model is nearly uniform, so that what it has read would not show
    return model


MODEL = tiny_model()


def test_texts_are_one_stream_cut_into_rows() -> None:
    tokens = from_texts(["abc", "de"], Letters(), length=3)
    assert tokens.tolist() == [[1, 2, 3], [0, 4, 5]]
    assert tokens.dtype == torch.int64


def test_limit_bounds_the_rows() -> None:
    assert from_texts(["abcdefgh"] * 9, Letters(), length=4, limit=2).shape == (2, 4)


@given(st.lists(st.text("abcxyz", max_size=9), max_size=9), st.integers(2, 7))
@settings(deadline=None, max_examples=60)
def test_no_token_is_lost_or_added(texts: list[str], length: int) -> None:
    stream = [i for text in texts for i in (*Letters()(text)["input_ids"], 0)]
    if len(stream) < length:
        with pytest.raises(CalibrationError):
            from_texts(texts, Letters(), length=length)
    else:
        rows = from_texts(texts, Letters(), length=length)
        assert rows.flatten().tolist() == stream[: len(stream) // length * length]


def test_files_of_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdef")
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n\n{"text": "def", "more": 1}\n')
    assert from_file(tmp_path / "a.txt", Letters(), length=3).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert from_file(tmp_path / "a.jsonl", Letters(), length=4).tolist() == [[1, 2, 3, 0], [4, 5, 6, 0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
def test_files_of_ids(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    ids, path = torch.arange(10).to(dtype), tmp_path / f"ids{suffix}"
    if suffix == ".pt":
        torch.save(ids, path)
    elif suffix == ".npy":
        numpy.save(path, ids.numpy())
    else:
        save_file({"tokens": ids}, path)
    tokens = from_file(path, length=4)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_rows_of_ids_keep_their_length() -> None:
    rows = torch.arange(12).view(4, 3)
    assert torch.equal(from_ids(rows, length=256, limit=2), rows[:2])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "abc"}\n{"txt": 1}\n', r'a\.jsonl:2: has no "text"'),
        ("a.jsonl", b"abc\n", r'a\.jsonl:1: has no "text"'),
        ("a.jsonl", b'{"text": null}\n', r'a\.jsonl:1: "text" is no string but null'),
        ("a.txt", b"", r"a\.txt: 1 texts: 1 tokens do not fill one sequence of 4"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.pt", b"no archive", r"a\.pt: cannot be read"),
        ("a.npy", b"no array", r"a\.npy: cannot be read"),
        ("a.safetensors", b"no tensors", r"a\.safetensors: cannot be read"),
    ],
)
def test_bad_files_name_themselves(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        from_file(tmp_path / name, Letters(), length=4)


def test_a_missing_file_lists_the_names() -> None:
    with pytest.raises(CalibrationError, match='"slef" is neither "self", "random", "none" nor a file'):
        calibration_tokens("slef", model=MODEL, sequences=2, length=4)


def test_text_without_a_tokenizer_says_so() -> None:
    with pytest.raises(CalibrationError, match="pass tokenizer="):
        from_texts(["abc"], None, length=2)


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.zeros(0, 8, dtype=torch.int64), "no sequence at all"),
        (torch.zeros(2, 1, dtype=torch.int64), "length 1; give at least 2"),
        (torch.zeros(2, 8), "dtype is torch.float32"),
        (torch.zeros(2, 8, dtype=torch.int32), "dtype is torch.int32"),
        (torch.zeros(8, dtype=torch.int64), "shape is \\[8\\]"),
        (torch.tensor([[0, 1], [2, 32]]), "id 32 at \\[1, 1\\] is not in the model's vocabulary of 32"),
        (torch.tensor([[0, -1]]), "id -1 at \\[0, 1\\]"),
    ],
)
def test_unusable_tokens_are_refused(tokens: Tensor, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        check(tokens, vocab_size=32)


def test_random_tokens_follow_the_seed_and_fill_the_vocabulary() -> None:
    tokens = random_tokens(5, sequences=40, length=10, seed=1)
    assert torch.equal(tokens, random_tokens(5, sequences=40, length=10, seed=1))
    assert not torch.equal(tokens, random_tokens(5, sequences=40, length=10, seed=2))
    assert set(tokens.unique().tolist()) == set(range(5))
    check(tokens, vocab_size=5)


def test_self_generated_tokens_follow_the_seed() -> None:
    tokens = self_generated(MODEL, sequences=5, length=12, seed=1)
    assert tokens.shape == (5, 12)
    assert torch.equal(tokens, self_generated(MODEL, sequences=5, length=12, seed=1))
    assert not torch.equal(tokens, self_generated(MODEL, sequences=5, length=12, seed=2))
    check(tokens, vocab_size=32)


def test_self_generated_tokens_are_the_models_own() -> None:
    tokens = self_generated(MODEL, sequences=200, length=8, seed=0, batch=64)
    with torch.no_grad():
        chances = MODEL(tokens[:, :-1]).logits.softmax(-1)
    found = chances.gather(-1, tokens[:, 1:, None]).log().mean()
    expected = (chances * chances.log()).sum(-1).mean()
    # 1400 samples: the mean log chance is its expectation to about 1/sqrt(1400) = 0.03 nats; uniform is far off
    assert abs(found - expected) < 0.15
    assert abs(torch.log(torch.tensor(1 / 32)) - expected) > 0.5


def test_a_model_without_a_cache_samples_the_same() -> None:
    class Uncached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = MODEL, MODEL.config

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            output = self.inner(input_ids, use_cache=False)
            assert output.past_key_values is None
            return output

    found, expected = (self_generated(model, sequences=3, length=10, seed=4) for model in (Uncached(), MODEL))
    assert torch.equal(found, expected)


def test_a_cache_that_does_not_serve_is_done_without() -> None:
    class Forgetful(torch.nn.Module):
        """Fails with its own cache, as models do whose layers keep states of other kinds."""

        config = MODEL.config

        def forward(self, input_ids: Tensor, use_cache: bool, past_key_values: Any = None) -> Any:
            if past_key_values is not None:
                raise ValueError("only attention layers have a length")
            return MODEL(input_ids=input_ids, use_cache=use_cache)

    found, expected = (self_generated(model, sequences=3, length=10, seed=4) for model in (Forgetful(), MODEL))
    assert torch.equal(found, expected)


def test_self_generation_reports_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    self_generated(MODEL, sequences=5, length=3, seed=0, batch=2, progress=lambda *step: seen.append(step))
    assert [(done, total) for _, done, total in seen] == [(2, 5), (4, 5), (5, 5)]


def test_a_limit_of_minus_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODEL.config, "max_position_embeddings", -1)  # as XLNet's config has it
    assert self_generated(MODEL, sequences=1, length=3, seed=0).shape == (1, 3)


def test_self_generation_refuses_what_it_cannot_do() -> None:
    with pytest.raises(CalibrationError, match="over the model's 64 positions"):
        self_generated(MODEL, sequences=1, length=65, seed=0)
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="logits are not finite"):
        self_generated(broken, sequences=1, length=4, seed=0)


def test_modes_come_back_module_by_module() -> None:
    model = tiny_model().train()
    model.model.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert model.training
    assert model.lm_head.training
    assert not model.model.training


def test_what_is_replaced_meanwhile_is_not_kept() -> None:
    model = tiny_model()
    gone = weakref.ref(model.lm_head)
    with evaluating(model):
        model.lm_head = torch.nn.Identity()
        assert gone() is None


@pytest.mark.parametrize(
    "source, shape",
    [
        ("self", (3, 6)),
        ("random", (3, 6)),
        (["abcdefgh"] * 9, (3, 6)),
        (torch.zeros(40, dtype=torch.int32), (3, 6)),
        (torch.zeros(9, 4, dtype=torch.int64), (3, 4)),
        ([torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)], (3, 5)),
    ],
)
def test_every_source_gives_rows(source: str | Tensor | Sequence[str], shape: tuple[int, int]) -> None:
    tokens = calibration_tokens(source, model=MODEL, tokenizer=Letters(), sequences=3, length=6)
    assert tokens is not None
    assert tokens.shape == shape
    assert tokens.dtype == torch.int64


def test_a_file_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "abcdef"}) for _ in range(4)))
    for path in (tmp_path / "a.jsonl", str(tmp_path / "a.jsonl")):
        tokens = calibration_tokens(path, model=MODEL, tokenizer=Letters(), sequences=3, length=6)
        assert tokens is not None
        assert tokens.shape == (3, 6)


def test_none_is_none() -> None:
    assert calibration_tokens("none", model=MODEL, sequences=3, length=6) is None


@pytest.mark.parametrize(
    "source, message",
    [
        ([], "0 texts: 0 tokens"),
        (torch.zeros(0, dtype=torch.int64), "0 tokens do not fill"),
        (torch.rand(3, 6), "dtype is torch.float32"),
        (torch.full((3, 6), 99), "id 99"),
        ([torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)], "give one length"),
    ],
)
def test_unusable_sources_are_refused(source: Tensor | Sequence[str], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration_tokens(source, model=MODEL, tokenizer=Letters(), sequences=3, length=6)


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"Linear: has no config\.vocab_size"):
        calibration_tokens("random", model=torch.nn.Linear(2, 2), sequences=3, length=6)


def test_more_tokens_than_a_table_of_positions_has_are_refused(tmp_path: Path) -> None:
    learned, computed = tiny.make("gpt2"), tiny.make("llama")
    most = learned.config.max_position_embeddings
    ids = tiny.ids(batch=1, length=most + 1)
    told = rf"sequences of {most + 1} tokens are over the model's {most} positions"
    with pytest.raises(CalibrationError, match=told):
        calibration_tokens("random", model=learned, sequences=1, length=most + 1)
    with pytest.raises(CalibrationError, match=told):
        perplexity(learned, tiny.ids(batch=1, length=most + 2))
    assert perplexity(learned, ids) > 0
    assert perplexity(computed, tiny.ids(batch=1, length=computed.config.max_position_embeddings + 2)) > 0

"""The tokenizer: deterministic, lossless, of the size asked for."""

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bwla_compiler.demo.corpus import Document
from bwla_compiler.demo.tokenizer import END_OF_TEXT_ID, encode_documents, train_tokenizer

RULE = "The number {} is followed by {}; that is the rule of numbers.\n"
DOCUMENTS = [Document(str(i), RULE.format(i, i + 1) * 8) for i in range(40)]
TOKENIZER = train_tokenizer(DOCUMENTS, 300)


def test_same_tokenizer_at_every_training() -> None:
    again = train_tokenizer(DOCUMENTS, 300)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_size_is_as_asked() -> None:
    assert len(TOKENIZER) == 300


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(deadline=None, max_examples=50)
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_documents_are_one_stream_with_ends_between() -> None:
    stream = encode_documents(TOKENIZER, DOCUMENTS[:3])
    assert stream.dtype == torch.int64
    assert int((stream == END_OF_TEXT_ID).sum()) == 3
    text = TOKENIZER.decode(stream.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text == "".join(document.text for document in DOCUMENTS[:3])


def test_saved_tokenizer_loads_by_auto_class(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "The number 7 is followed by a rule."
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.eos_token_id == END_OF_TEXT_ID

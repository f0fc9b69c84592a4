"""A tokenizer of 128 letters, as many as the tiny models know ids."""

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def letters() -> Any:
    """Return a tokenizer of 128 letters, those of ASCII."""
    core = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token=chr(1)))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=chr(1), pad_token=chr(1), unk_token=chr(1))

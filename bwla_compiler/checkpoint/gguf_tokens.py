"""A byte-level BPE tokenizer as GGUF tells it: tokens, their types, merges, and how text is cut before merging."""

import json
from dataclasses import dataclass
from typing import Any

from bwla_compiler.errors import CheckpointError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {f"{_WORDS}\\p{{N}}{_REST}": "qwen2", f"{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe"}
"""Patterns by which tokenizers cut text, and llama.cpp's names of them; ByteLevel's own pattern is "gpt-2"."""

NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5
"""GGUF's types of a token."""


@dataclass(frozen=True)
class Vocabulary:
    """cut: llama.cpp's name of the pre-tokenizer. tokens, types, merges: as GGUF lists them. special: ids by role
    (bos, eos, padding). begins: whether a text begins with bos.
    """

    cut: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: dict[str, int]
    begins: bool
    template: str


def read_vocabulary(tokenizer: Any, *, size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer, filled up to `size` tokens, the rows of the embedding.

    Raises CheckpointError where it is no byte-level BPE, or cuts text in a way that llama.cpp has no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"a {type(tokenizer).__name__}, not one of the tokenizers library")
    table = json.loads(backend.to_str())
    if table["model"]["type"] != "BPE" or table["model"].get("byte_fallback"):
        raise _refused(f"a {table['model']['type']} model with a vocabulary of its own, not byte-level BPE")
    added = {entry["id"]: entry for entry in table["added_tokens"]}
    by_id = {number: text for text, number in table["model"]["vocab"].items()}
    by_id |= {number: entry["content"] for number, entry in added.items()}
    if max(by_id) >= size:
        raise _refused(f"{max(by_id) + 1} tokens for an embedding of {size} rows")
    kinds = {n: (CONTROL if added[n]["special"] else USER) if n in added else NORMAL for n in by_id}
    return Vocabulary(
        cut=_cut(table["pre_tokenizer"]),
        tokens=tuple(by_id.get(n, f"[PAD{n}]") for n in range(size)),
        types=tuple(kinds.get(n, UNUSED) for n in range(size)),
        merges=tuple(m if isinstance(m, str) else " ".join(m) for m in table["model"]["merges"]),
        special=_special(tokenizer),
        begins=_begins(tokenizer),
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else "",
    )


def _special(tokenizer: Any) -> dict[str, int]:
    roles = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    return {role: number for role, number in roles.items() if number is not None}


def _begins(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _cut(step: Any) -> str:
    """Return llama.cpp's name of a pre-tokenizer: the GPT-2 pattern of ByteLevel, or a known one before it."""
    steps = (step or {}).get("pretokenizers", [step])
    byte_level = [s for s in steps if s and s["type"] == "ByteLevel"]
    patterns = [s["pattern"].get("Regex", "") for s in steps if s and s["type"] == "Split"]
    if len(byte_level) == 1 and not byte_level[0]["add_prefix_space"] and len(steps) == 1 + len(patterns):
        if not patterns and byte_level[0].get("use_regex", True):
            return "gpt-2"
        if len(patterns) == 1 and patterns[0] in CUTS and not byte_level[0].get("use_regex", True):
            return CUTS[patterns[0]]
    raise _refused("a pre-tokenizer that llama.cpp has no name for")


def _refused(why: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer cannot be told in GGUF: {why}; export the model's folder without tokenizer files, and give "
        "token ids to llama.cpp"
    )

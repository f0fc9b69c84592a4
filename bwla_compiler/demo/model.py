"""The embedded models by name, "demo:" and "demo:outliers", with tokenizer and token splits; built once and cached."""

import ast
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from bwla_compiler.demo import corpus, muon, outliers, parts, store, tokenizer, train
from bwla_compiler.demo.config import DemoConfig
from bwla_compiler.errors import DemoError
from bwla_compiler.settings import settings

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
Split = Literal["train", "test", "ood"]

PREFIX = "demo:"
NAMES = ("demo:", "demo:outliers")
SPLITS = ("train", "test", "ood")
WEIGHTS = "model.safetensors"
TOKENS = "tokens.safetensors"
PCA_SEQUENCES = 64  # calibration sequences that define the outlier model's basis


@dataclass(frozen=True)
class DemoModel:
    """A loaded embedded model, float32 in eval mode on the CPU.

    path: its folder, in the form that from_pretrained reads. fingerprint: sha256 of its weights' file.
    facts: how it was made (steps, n_tokens, seconds, n_parameters, text_sha256, versions).
    """

    model: Qwen3ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    path: Path
    fingerprint: str
    facts: dict[str, Any]


def is_demo(name: str) -> bool:
    """Return whether a model's name means an embedded model, known or not."""
    return name.startswith(PREFIX)


def load_demo(name: str, *, config: DemoConfig | None = None, progress: Progress | None = None) -> DemoModel:
    """Return the embedded model of that name, trained first where the cache has none (some minutes).

    Raises DemoError for an unknown name, a library without sources, or a cache that cannot be written.
    """
    path = demo_path(name, config=config, progress=progress)
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    loaded = PreTrainedTokenizerFast.from_pretrained(path)
    return DemoModel(model, loaded, path, store.file_sha256(path, WEIGHTS), store.facts(path))


def demo_path(name: str, *, config: DemoConfig | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of the embedded model of that name, trained first where the cache has none.

    Raises DemoError as load_demo does.
    """
    if name not in NAMES:
        raise DemoError(f'"{name}" is no embedded model; there are {", ".join(NAMES)}')
    config = config or DemoConfig()
    if name == "demo:outliers":
        return store.ensure(_folder("outliers", config), lambda folder: _build_outliers(folder, config, progress))
    return store.ensure(_folder("base", config), lambda folder: _build_base(folder, config, progress))


def demo_tokens(
    split: Split, *, sequences: int, length: int, seed: int = 0, config: DemoConfig | None = None
) -> Tensor:
    """Return tokens [sequences, length + 1] int64 of the embedded model's text.

    "test": held-out files (prose), evenly spaced; "ood": their sources (code), evenly spaced; "train": drawn with
    the seed. Trains no model. Raises DemoError for an unknown split or more tokens than the split has.
    """
    if split not in SPLITS:
        raise DemoError(f'"{split}" is no split of the embedded text; there are {", ".join(SPLITS)}')
    stream = load_file(text_path(config=config) / TOKENS)[split].to(torch.int64)
    last = stream.numel() - length - 1
    if last < 0 or sequences * length > stream.numel():
        raise DemoError(f"{sequences} x {length} tokens of {split}: it has {stream.numel()} tokens; ask for fewer")
    if split == "train":
        starts = torch.randint(0, last + 1, (sequences,), generator=torch.Generator().manual_seed(seed))
    else:
        starts = torch.arange(sequences) * last // max(1, sequences - 1)
    return stream[starts[:, None] + torch.arange(length + 1)]


def text_path(*, config: DemoConfig | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of the tokenizer and the token streams, made first where the cache has none (seconds)."""
    config = config or DemoConfig()
    return store.ensure(_folder("text", config), lambda folder: _build_text(folder, config, progress))


def _build_text(folder: Path, config: DemoConfig, progress: Progress | None) -> dict[str, Any]:
    if progress is not None:
        progress("reading the standard library", 0, 1)
    text = corpus.read_corpus(n_files=config.n_files, held_out=config.held_out)
    bpe = tokenizer.train_tokenizer(text.train, config.vocab_size)
    bpe.save_pretrained(folder)
    splits = {"train": text.train, "test": text.test, "ood": text.ood}
    streams = {name: tokenizer.encode_documents(bpe, split) for name, split in splits.items()}
    save_file({name: stream.to(torch.int32) for name, stream in streams.items()}, folder / TOKENS)
    if progress is not None:
        progress("reading the standard library", 1, 1)
    return {
        "text_sha256": text.sha256,
        "n_documents": {name: len(split) for name, split in splits.items()},
        "n_tokens": {name: stream.numel() for name, stream in streams.items()},
        "python": sys.version.split()[0],
    }


def _build_base(folder: Path, config: DemoConfig, progress: Progress | None) -> dict[str, Any]:
    text = text_path(config=config, progress=progress)
    bpe = PreTrainedTokenizerFast.from_pretrained(text)
    model = train.new_model(config, len(bpe))
    stream = load_file(text / TOKENS)["train"].to(torch.int64)
    training = train.train(model, stream, config=config, progress=progress)
    return _save(folder, model, bpe) | asdict(training) | {"text_sha256": store.facts(text)["text_sha256"]}


def _build_outliers(folder: Path, config: DemoConfig, progress: Progress | None) -> dict[str, Any]:
    base = load_demo("demo:", config=config, progress=progress)
    tokens = demo_tokens("train", sequences=PCA_SEQUENCES, length=config.length, config=config)
    outliers.add_outliers(base.model, tokens[:, :-1])
    return base.facts | _save(folder, base.model, base.tokenizer) | {"rewritten_from": base.fingerprint}


def _save(folder: Path, model: Qwen3ForCausalLM, bpe: PreTrainedTokenizerFast) -> dict[str, Any]:
    model.save_pretrained(folder)
    bpe.save_pretrained(folder)
    return {
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__,
        "n_threads": torch.get_num_threads(),
    }


def _folder(kind: Literal["text", "base", "outliers"], config: DemoConfig) -> Path:
    """Return where an artifact lies: its key is a hash of the text, of the config and of the code that makes it."""
    text = (corpus.sources_sha256(None, config.n_files), config.n_files, config.held_out, config.vocab_size)
    key_parts: list[Any] = [kind, text, code_sha256(corpus), code_sha256(tokenizer)]
    if kind != "text":
        wanted = asdict(config)
        del wanted["second_limit"]  # it says how long to wait, not which model is wanted
        key_parts += [wanted, code_sha256(train), code_sha256(muon)]
    if kind == "outliers":
        key_parts += [PCA_SEQUENCES, code_sha256(outliers), code_sha256(parts)]
    key = hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()[:16]
    return settings().cache / "demo" / f"{kind}-{key}"


@cache
def code_sha256(module: ModuleType) -> str:
    """Return a hash of a module's code that comments, docstrings and layout do not change."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()

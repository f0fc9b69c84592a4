"""Models and texts of the quality table: the embedded model, or a fresh one trained on a fresh split by seed."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.package_text import package_documents, package_sources
from bwla_compiler.demo import DemoConfig, load_demo
from bwla_compiler.demo.corpus import Document, read_corpus, source_files
from bwla_compiler.demo.model import PCA_SEQUENCES
from bwla_compiler.demo.outliers import Tails, add_outliers
from bwla_compiler.demo.store import ensure, facts
from bwla_compiler.demo.tokenizer import encode_documents, train_tokenizer
from bwla_compiler.demo.train import new_model, train
from bwla_compiler.settings import settings

Progress = Callable[[str, int, int], None]

LENGTH = 256
WINDOWS_A_FILE = 6
"""At most, so that one long file does not decide."""
TOKENS = "tokens.safetensors"
"""A model's text as streams of ids: "train", and perhaps "test" and "ood"."""
FACTS = "training.json"
"""How a model was trained, where its folder tells: "n_tokens" and more."""


@dataclass(frozen=True)
class Subject:
    """A float model and its texts.

    load(): a new copy. train: stream of tokens int64. windows, files: of held-out prose, [n, LENGTH + 1] int64 and the
    number of each one's file [n]; ood: the same of code. trained_tokens: how many it learned from, where told.
    """

    label: str
    load: Callable[[], nn.Module]
    train: Tensor
    windows: Tensor
    files: Tensor
    ood: Tensor
    ood_files: Tensor
    trained_tokens: int | None = None

    def calibration(self, sequences: int, *, seed: int) -> Tensor:
        """Return sequences drawn from the training text, [sequences, LENGTH] int64."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, self.train.numel() - LENGTH, (sequences, 1), generator=generator)
        return self.train[starts + torch.arange(LENGTH)]


def embedded(name: str, *, files: int) -> Subject:
    """Return the embedded model of that name with its own split."""
    loaded, corpus = load_demo(name), read_corpus()
    windows = _held_out(loaded.tokenizer, corpus.test, corpus.ood, files=files)
    stream = encode_documents(loaded.tokenizer, corpus.train)
    label, trained = name.strip(":").replace(":", "-"), loaded.facts["n_tokens"]
    return Subject(label, lambda: load_demo(name).model, stream, *windows, trained_tokens=trained)


def fresh(seed: int, *, files: int, progress: Progress) -> Subject:
    """Return a model of the embedded one's architecture, trained and split by this seed; cached."""
    config = DemoConfig(seed=seed, second_limit=math.inf)  # the same model on a slow machine
    kept, held_out, code = texts(seed, fraction=config.held_out)
    key = hashlib.sha256(repr((read_corpus().sha256, asdict(config))).encode()).hexdigest()[:16]
    build = lambda folder: _build(folder, kept, config, progress)  # noqa: E731
    folder = ensure(settings().cache / "quality" / f"seed{seed}-{key}", build)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    stream = load_file(folder / TOKENS)["train"].to(torch.int64)
    windows = _held_out(tokenizer, held_out, code, files=files)
    return Subject(f"seed{seed}", lambda: floats(folder), stream, *windows, trained_tokens=facts(folder)["n_tokens"])


def texts(
    seed: int, *, fraction: float, packages: Sequence[str] = ()
) -> tuple[list[Document], list[Document], list[Document]]:
    """Return the embedded model's documents split by a seed: to train on, held out, and the code of those held out.

    packages: installed ones, whose docstrings are added. Raises DemoError for one that is not installed.
    """
    corpus = read_corpus()
    documents, sources = [*corpus.train, *corpus.test], dict(source_files())
    for name in packages:
        documents += package_documents(name)
        sources |= package_sources(name)
    held_out, kept = split(documents, seed, fraction=fraction)
    held = {document.name for document in held_out}
    code = [Document(name, path.read_text("utf-8", errors="replace")) for name, path in sources.items() if name in held]
    return kept, held_out, code


def floats(folder: Path) -> nn.Module:
    """Return a new copy of a folder's model."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def with_tails(subject: Subject, tails: Tails) -> Subject:
    """Return the subject with its model's activations made heavy-tailed, its function unchanged.

    Its name ends in "pca", or in "outliers" where channels are heavy too. Raises DemoError, once it is loaded, where
    the model is of a family that `add_outliers` does not know.
    """
    tokens = subject.calibration(PCA_SEQUENCES, seed=0)

    def load() -> nn.Module:
        model: Any = subject.load()
        add_outliers(model, tokens, tails=tails)
        return model  # type: ignore[no-any-return]

    return replace(subject, label=f"{subject.label}-{'pca' if tails == 'pca' else 'outliers'}", load=load)


def split(documents: Sequence[Document], seed: int, *, fraction: float) -> tuple[list[Document], list[Document]]:
    """Return (held out, kept): files in an order drawn by the seed are held out until they hold their fraction."""
    order = sorted(documents, key=lambda d: hashlib.sha256(f"{seed}:{d.name}".encode()).hexdigest())
    wanted, taken, held_out = fraction * sum(len(d.text) for d in documents), 0, []
    longest = wanted / 4  # one long file is no sample
    for document in order:
        if taken < wanted and len(document.text) <= longest:
            held_out.append(document)
            taken += len(document.text)
    names = {d.name for d in held_out}
    return held_out, [d for d in documents if d.name not in names]


def _build(folder: Path, documents: Sequence[Document], config: DemoConfig, progress: Progress) -> dict[str, Any]:
    tokenizer = train_tokenizer(documents, config.vocab_size)
    stream = encode_documents(tokenizer, documents)
    model = new_model(config, len(tokenizer))
    training = train(model, stream, config=config, progress=progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({"train": stream.to(torch.int32)}, folder / TOKENS)
    return asdict(training)


def _held_out(
    tokenizer: PreTrainedTokenizerFast, prose: Sequence[Document], code: Sequence[Document], *, files: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_windows(tokenizer, prose, files=files), *_windows(tokenizer, code, files=files))


def _windows(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], *, files: int) -> tuple[Tensor, Tensor]:
    """Return whole windows [n, LENGTH + 1] of at most so many files, evenly spaced in each, and their files [n]."""
    windows: list[Tensor] = []
    owners: list[int] = []
    for number, document in enumerate(documents):
        stream = encode_documents(tokenizer, [document])
        whole = (stream.numel() - 1) // LENGTH
        if whole == 0 or len(set(owners)) == files:
            continue
        count = min(whole, WINDOWS_A_FILE)
        for start in (torch.arange(count) * whole // count * LENGTH).tolist():
            windows.append(stream[start : start + LENGTH + 1])
            owners.append(number)
    return torch.stack(windows), torch.tensor(owners)

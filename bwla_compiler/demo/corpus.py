"""The text of the embedded model: what every Python carries, split by whole files into train, test and ood.

train and test hold the language reference (`pydoc_data.topics`) and the docstrings of the standard library;
ood holds the sources (code, not prose) of the files held out for test. No installed package is read.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bwla_compiler.errors import DemoError

TOPICS = "pydoc_data/topics.py"
# Folders that distributions ship apart or leave out: reading them would make the text depend on what is installed.
SKIPPED = frozenset(
    (
        "site-packages", "dist-packages", "lib-dynload", "test", "tests", "idle_test", "idlelib", "lib2to3", "tkinter",
        "turtledemo", "distutils", "ensurepip", "__pycache__",
    )
)
SKIPPED_BEGINNINGS = ("_sysconfigdata", "config-")  # written when that Python was built
SHORTEST_DOCSTRING = 60
SHORTEST_DOCUMENT = 400
LONGEST_HELD_OUT = 60_000


@dataclass(frozen=True)
class Document:
    """One file's prose (or, in ood, its source)."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents of the three splits, each sorted by name; no docstring occurs twice in train and test together."""

    train: tuple[Document, ...]
    test: tuple[Document, ...]
    ood: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        """The hash of all names and texts; it differs between Python versions."""
        digest = hashlib.sha256()
        for split in (self.train, self.test, self.ood):
            for document in split:
                digest.update(f"{document.name}\0{document.text}\0".encode(errors="replace"))
            digest.update(b"\1")
        return digest.hexdigest()


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def source_files(root: Path | None = None, *, n_files: int | None = None) -> list[tuple[str, Path]]:
    """Return (relative name, path) of the library's files that are read, sorted by name.

    root: the standard library's folder (default: this Python's). n_files: keep that many, picked by the hash
    of the name. Raises DemoError where there are none (a frozen or zipped Python).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    kept = [n for n in names if SKIPPED.isdisjoint(n.split("/")) and not n.startswith(SKIPPED_BEGINNINGS)]
    if not kept:
        raise DemoError(f"{root}: no Python sources here to train on; use a Python whose library is on disk")
    if n_files is not None:
        kept = sorted(kept, key=_order)[:n_files]
    return [(name, root / name) for name in sorted(kept)]


@cache
def sources_sha256(root: Path | None = None, n_files: int | None = None) -> str:
    """Return the hash of the files' names and bytes: cheap, and enough to know the corpus by."""
    digest = hashlib.sha256()
    for name, path in source_files(root, n_files=n_files):
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def read_corpus(root: Path | None = None, *, n_files: int | None = None, held_out: float = 0.06) -> Corpus:
    """Return the corpus: deterministic, deduplicated, with about `held_out` of its characters in test.

    Raises DemoError where the text does not give every split something.
    """
    files = dict(source_files(root, n_files=n_files))
    documents = list(_documents(files))
    wanted = held_out * sum(len(document.text) for document in documents)
    test: set[str] = set()
    n_characters = 0
    for document in sorted(documents, key=lambda d: _order("split:" + d.name)):
        if n_characters < wanted and len(document.text) < LONGEST_HELD_OUT:
            test.add(document.name)
            n_characters += len(document.text)
    ood = [Document(n, files[n].read_text("utf-8", errors="replace")) for n in sorted(test & files.keys())]
    corpus = Corpus(
        train=tuple(d for d in documents if d.name not in test),
        test=tuple(d for d in documents if d.name in test),
        ood=tuple(ood),
    )
    if not (corpus.train and corpus.test and corpus.ood):
        raise DemoError(f"{len(documents)} documents do not fill train, test and ood; read more files (n_files)")
    return corpus


def _documents(files: dict[str, Path]) -> Iterator[Document]:
    seen: set[str] = set()
    for name, path in files.items():
        tree = _parse(path)
        if tree is None:
            continue
        if name == TOPICS:
            texts = {f"{TOPICS}:{topic}": [text] for topic, text in sorted(_topics(tree).items())}
        else:
            texts = {name: list(_docstrings(tree))}
        for title, parts in texts.items():
            fresh = [part for part in dict.fromkeys(parts) if part not in seen]
            seen.update(fresh)
            text = "\n\n".join(fresh)
            if len(text) >= SHORTEST_DOCUMENT:
                yield Document(title, text)


def _parse(path: Path) -> ast.Module | None:
    """Return the file's syntax tree, or None for the few templates in the library that are not valid Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return None


def _topics(tree: ast.Module) -> dict[str, str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {str(key): str(text) for key, text in ast.literal_eval(node.value).items()}
    return {}


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST_DOCSTRING:
                yield text if isinstance(node, ast.Module) else f"{node.name}\n{text}"

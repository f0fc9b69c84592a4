"""Docstrings of installed packages, for models that learn from more text than the standard library has."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from bwla_compiler.demo.corpus import Document, read_corpus, source_files
from bwla_compiler.errors import DemoError


def package_documents(name: str) -> list[Document]:
    """Return the prose of a package's files, each named from its folder; no docstring of a package comes twice.

    Raises DemoError where no such package is installed as a folder.
    """
    corpus = read_corpus(_folder(name))
    return [Document(f"{name}/{document.name}", document.text) for document in (*corpus.train, *corpus.test)]


def package_sources(name: str) -> dict[str, Path]:
    """Return a package's files by the names that `package_documents` gives them. Raises DemoError as it does."""
    return {f"{name}/{file}": path for file, path in source_files(_folder(name))}


def package_version(name: str) -> str:
    """Return the version of an installed package."""
    return version(name)


def _folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(f"{name}: no package of that name is installed; its docstrings cannot be read")
    return Path(spec.submodule_search_locations[0])

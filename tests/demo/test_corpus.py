"""The text: deterministic, split by whole files, without repetition, and of the standard library alone."""

from pathlib import Path

import pytest

from bwla_compiler.demo.corpus import read_corpus, source_files, sources_sha256
from bwla_compiler.errors import DemoError

PROSE = "This sentence is long enough to count as a docstring of the toy library, file {name}, part {part}. "


def library(root: Path, n_files: int = 30) -> Path:
    for index in range(n_files):
        name = f"package/file_{index:02d}"
        parts = [f'def f{part}():\n    """{PROSE.format(name=name, part=part) * 3}"""\n' for part in range(4)]
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts))
    return root


def test_same_text_at_every_reading() -> None:
    first, second = read_corpus(n_files=25, held_out=0.2), read_corpus(n_files=25, held_out=0.2)
    assert first == second
    assert first.sha256 == second.sha256


def test_held_out_files_are_whole_and_never_in_training(tmp_path: Path) -> None:
    corpus = read_corpus(library(tmp_path), held_out=0.2)
    train, test = ({document.name for document in split} for split in (corpus.train, corpus.test))
    assert not train & test
    assert len(train | test) == 30
    assert {document.name for document in corpus.ood} == test
    prose = "\n".join(document.text for document in corpus.train)
    assert not any(document.name in prose for document in corpus.test)  # each docstring names its file
    share = sum(len(d.text) for d in corpus.test) / sum(len(d.text) for d in (*corpus.train, *corpus.test))
    assert 0.2 <= share < 0.2 + 1 / 15  # files are of one size: the last one taken may overshoot


def test_a_docstring_counts_once(tmp_path: Path) -> None:
    library(tmp_path)
    copied = (tmp_path / "package/file_03.py").read_text()
    before = read_corpus(tmp_path, held_out=0.2)
    (tmp_path / "package/zz_copy.py").write_text(copied)
    after = read_corpus(tmp_path, held_out=0.2)
    assert (after.train, after.test) == (before.train, before.test)


def test_topics_become_documents_of_their_own(tmp_path: Path) -> None:
    library(tmp_path)
    topics = {name: f"The {name} statement. " * 40 for name in ("assert", "with")}
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data/topics.py").write_text(f"# made by Sphinx\ntopics = {topics!r}\n")
    corpus = read_corpus(tmp_path, held_out=0.2)
    texts = {document.name: document.text for document in (*corpus.train, *corpus.test)}
    assert texts["pydoc_data/topics.py:with"] == topics["with"]


def test_installed_packages_and_tests_are_not_read(tmp_path: Path) -> None:
    for folder in ("site-packages", "dist-packages", "test", "unittest/test"):
        library(tmp_path / folder, 1)
    library(tmp_path, 2)
    assert [name for name, _ in source_files(tmp_path)] == ["package/file_00.py", "package/file_01.py"]


def test_invalid_files_are_passed_over(tmp_path: Path) -> None:
    before = read_corpus(library(tmp_path), held_out=0.2)
    (tmp_path / "package/bad.py").write_text("def (:\n")
    (tmp_path / "package/nul.py").write_bytes(b"x = 1\0")
    assert read_corpus(tmp_path, held_out=0.2) == before


def test_the_cheap_hash_sees_a_changed_byte(tmp_path: Path) -> None:
    library(tmp_path)
    before = sources_sha256(tmp_path)
    sources_sha256.cache_clear()
    assert sources_sha256(tmp_path) == before
    (tmp_path / "package/file_00.py").write_text("x = 1\n")
    sources_sha256.cache_clear()
    assert sources_sha256(tmp_path) != before


def test_no_sources_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="no Python sources"):
        read_corpus(tmp_path)


def test_too_little_text_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="do not fill train, test and ood"):
        read_corpus(library(tmp_path, 1))

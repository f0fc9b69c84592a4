"""What Inductor found of vector instructions: taken from the file where it still holds, sought anew where not."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._inductor import config, cpu_vec_isa

from bwla_compiler.backend.vector_isas import recall_isas, remember_isas
from bwla_compiler.codegen.build import compiler_version

LOOK = cpu_vec_isa.valid_vec_isa_list

pytestmark = pytest.mark.skipif(compiler_version() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path))
    yield tmp_path
    LOOK.cache_clear()


def remembered(folder: Path) -> Path:
    """Return the file of what Inductor finds here."""
    LOOK.cache_clear()
    LOOK()
    remember_isas()
    (file,) = (folder / "inductor").iterdir()
    LOOK.cache_clear()
    return file


def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda *_: pytest.fail("tried again"))
    cpu_vec_isa.VecISA._VecISA__bool__impl.cache_clear()  # type: ignore[attr-defined]


def test_what_was_found_is_taken_without_a_trial(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    before = [str(isa) for isa in LOOK()]
    file = remembered(own_cache)
    assert json.loads(file.read_text()) == before
    no_trials(monkeypatch)
    recall_isas()
    assert [str(isa) for isa in LOOK()] == before
    assert config.cpp.vec_isa_ok is None, "a setting of the user's"


def test_fewer_than_the_processor_has_are_sought_anew(own_cache: Path) -> None:
    file = remembered(own_cache)
    before = file.read_text()
    file.write_text(json.dumps(["others"]))
    recall_isas()
    assert not LOOK.cache_info().currsize
    LOOK()
    remember_isas()
    assert file.read_text() == before, "the next process would try again"


def test_a_damaged_file_is_removed(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = remembered(own_cache)
    file.write_text('["avx')
    recall_isas()
    assert not file.exists()
    assert "damaged" in caplog.text
    assert not LOOK.cache_info().currsize


def test_what_the_user_says_is_not_overridden(own_cache: Path) -> None:
    remembered(own_cache)
    with config.patch({"cpp.vec_isa_ok": False}):
        recall_isas()
        assert not LOOK.cache_info().currsize


def test_nothing_is_written_before_inductor_has_looked(own_cache: Path) -> None:
    LOOK.cache_clear()
    remember_isas()
    assert not (own_cache / "inductor").exists()


def test_no_compiler_is_no_error(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setenv("BWLA_CXX", "")
    recall_isas()
    remember_isas()
    assert not (own_cache / "inductor").exists()

"""Compilation: cache, keys, parallel processes, missing and failing compilers; and the choice of instruction set."""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bwla_compiler.codegen import build as building
from bwla_compiler.codegen import library
from bwla_compiler.codegen.build import build, compiler_version
from bwla_compiler.codegen.cpp_linear import emit
from bwla_compiler.codegen.isa import FLAGS, ISAS, Isa, best_isa, cpu_flags, describe, supported
from bwla_compiler.errors import BuildError
from bwla_compiler.settings import settings

TINY = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path))
    return tmp_path


def test_builds_once(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    first = build(TINY, "portable")
    assert first is not None
    assert first.parent == own_cache / "kernels"
    monkeypatch.setattr(building, "_compile", lambda *_, **__: pytest.fail("compiled again"))
    assert build(TINY, "portable") == first
    left = [path.name for path in first.parent.iterdir() if path.suffix != ".lock"]
    assert left == [first.name], "temporary files stay behind"


def test_source_and_isa_are_in_the_key() -> None:
    paths = {build(TINY, "portable"), build(TINY + "\n", "portable"), build(TINY, "avx2")}
    assert len(paths) == 3


@pytest.mark.parametrize("isa", [isa for isa in ISAS if set(FLAGS[isa]) <= set(FLAGS["amx"])])
def test_kernels_compile_without_a_warning(isa: Isa) -> None:
    """A warning has told of a statement that stood outside of its loop."""
    if compiler_version() is None or (FLAGS[isa] and not supported("avx2")):
        pytest.skip("no compiler for it")
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-psabi", *FLAGS[isa]]
    command = [*shlex.split(settings().compiler), *flags, "-x", "c++", "-"]
    run = subprocess.run(command, input=emit(isa), capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("compiler", ["", "no-such-compiler-anywhere"])
def test_no_compiler_gives_none(monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("BWLA_CXX", compiler)
    assert compiler_version() is None
    assert build(TINY, "portable") is None


def test_failure_carries_the_compilers_words(own_cache: Path) -> None:
    with pytest.raises(BuildError, match="no_such_name"):
        build("int f() { return no_such_name; }\n", "portable")
    assert list((own_cache / "kernels").glob("*.so")) == []


def test_cache_that_is_a_file_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("BWLA_CACHE", str(file))
    with pytest.raises(BuildError, match="BWLA_CACHE"):
        build(TINY, "portable")


def test_two_processes_build_the_same_library(own_cache: Path) -> None:
    code = (
        "import ctypes; from bwla_compiler.codegen.build import build; "
        f"print(ctypes.CDLL(str(build({TINY!r}, 'portable'))).answer())"
    )

    def run(_: int) -> str:
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": root}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == ["42\n", "42\n"]
    assert len(list((own_cache / "kernels").glob("*.so"))) == 1


def test_isa_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert supported("portable")
    assert best_isa() in ISAS
    assert best_isa() in describe()
    monkeypatch.setattr("bwla_compiler.codegen.isa.cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    assert best_isa() == "avx2"
    monkeypatch.setattr("bwla_compiler.codegen.isa.cpu_flags", frozenset)
    assert best_isa() == "portable"
    assert isinstance(cpu_flags(), frozenset)


@pytest.mark.parametrize("isa", ISAS)
def test_source_is_free_of_torch_and_deterministic(isa: str) -> None:
    source = emit(isa)  # type: ignore[arg-type]
    assert source == emit(isa)  # type: ignore[arg-type]
    assert "torch" not in source
    assert "ATen" not in source
    assert ("immintrin.h" in source) == (isa == "amx" or isa.startswith("avx"))
    assert ("arm_neon.h" in source) == (isa == "neon")


def test_a_compiler_too_old_for_amx(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def load(isa: str) -> str:
        if isa == "amx":
            raise BuildError("g++: error: unrecognized command line option -mamx-tile")
        return isa

    monkeypatch.setattr(library, "load", load)
    monkeypatch.setattr(library, "best_isa", lambda: "amx")
    assert library.best_library() == "avx512vbmi"
    assert "unrecognized command line option" in caplog.text
    monkeypatch.setattr(library, "best_isa", lambda: "avx2")
    assert library.best_library() == "avx2"
    monkeypatch.setattr(library, "load", lambda isa: load("amx"))
    with pytest.raises(BuildError):
        library.best_library()

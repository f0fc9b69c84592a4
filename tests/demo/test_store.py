"""The cache: whole or absent, whatever happens while it is written."""

import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from bwla_compiler.demo.store import damage, ensure, facts, file_sha256
from bwla_compiler.errors import DemoError

# Children that only handle files may be forked; spawned ones would import torch anew, at seconds each.
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def build(folder: Path) -> dict[str, Any]:
    (folder / "weights").write_text("whole")
    (folder / "part").mkdir()
    (folder / "part/more").write_text("also whole")
    return {"steps": 3}


def never(folder: Path) -> dict[str, Any]:
    raise AssertionError("built again")


def slow(folder: Path) -> dict[str, Any]:
    (folder / "weights").write_text("half")
    (folder.parent / "started").touch()
    time.sleep(60)
    return {}


def counting(folder: Path) -> dict[str, Any]:
    with open(folder.parent / "builds", "a") as file:
        file.write("x")
    time.sleep(0.2)
    return build(folder)


def test_built_once_and_then_read(tmp_path: Path) -> None:
    ensure(tmp_path / "a", build)
    ensure(tmp_path / "a", never)
    assert facts(tmp_path / "a") == {"steps": 3}
    assert damage(tmp_path / "a") is None
    assert len(file_sha256(tmp_path / "a", "part/more")) == 64


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(tmp_path / "a", fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    process = FORK.Process(target=ensure, args=(tmp_path / "a", slow))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert damage(tmp_path / "a") == "absent"
    assert len(list(tmp_path.glob(".a.*.tmp"))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensure(tmp_path / "a", build)  # nothing damaged: no warning
    assert list(tmp_path.glob(".a.*.tmp")) == []  # the dead process's leavings are gone


def test_parallel_processes_build_once(tmp_path: Path) -> None:
    processes = [FORK.Process(target=ensure, args=(tmp_path / "a", counting)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "x"


@pytest.mark.parametrize("harm", ["changed", "truncated", "missing", "no manifest", "bad manifest"])
def test_a_damaged_folder_is_rebuilt_with_a_warning(tmp_path: Path, harm: str) -> None:
    folder = ensure(tmp_path / "a", build)
    if harm == "changed":
        (folder / "weights").write_text("whale")
    elif harm == "truncated":
        (folder / "part/more").write_bytes(b"")
    elif harm == "missing":
        (folder / "weights").unlink()
    elif harm == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text('{"sha256": [')
    with pytest.warns(UserWarning, match="damaged"):
        ensure(folder, build)
    assert damage(folder) is None
    assert (folder / "weights").read_text() == "whole"


def test_an_unwritable_cache_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DemoError, match="BWLA_CACHE"):
        ensure(tmp_path / "file" / "a", build)

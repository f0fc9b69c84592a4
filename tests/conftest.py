"""What every test shares: one thread a worker, no network, a cache that is not the user's."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_BUILDING = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag that writes golden files anew; `git diff` then shows what changed."""
    parser.addoption("--rewrite-goldens", action="store_true", help="write the golden files as the code makes them now")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return what compares a text with the golden file of a name, in `golden/` beside the test."""
    folder = Path(request.path).parent / "golden"

    def compare(name: str, text: str) -> None:
        path = folder / name
        if request.config.getoption("--rewrite-goldens"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
        remedy = f"{path} is out of date: python -m pytest {request.path} --rewrite-goldens, and read the diff"
        assert path.is_file(), remedy
        assert path.read_text("utf-8") == text, remedy

    return compare


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test imports torch; xdist's workers inherit it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: more threads only fight
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    if cache is not None:
        os.environ.setdefault("BWLA_CACHE", str(cache.mkdir("bwla")))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start building the kernels while tests are collected: the first that needs them waits for less."""
    if not hasattr(session.config, "workerinput"):
        code = "from bwla_compiler.runtime.native import install; install()"
        session.config.stash[_BUILDING] = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave no process behind."""
    building = session.config.stash.get(_BUILDING, None)
    if building is not None:
        building.wait()

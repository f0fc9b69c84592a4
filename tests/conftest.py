"""What every test shares: one thread a worker, no network, a cache that is not the user's."""

import os
import subprocess
import sys

import pytest

_BUILDING = pytest.StashKey[subprocess.Popen[bytes]]()


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

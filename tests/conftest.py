"""What every test shares: one thread a worker, no network, a cache that is not the user's."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test imports torch; xdist's workers inherit it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: more threads only fight
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    if cache is not None:
        os.environ.setdefault("BWLA_CACHE", str(cache.mkdir("bwla")))

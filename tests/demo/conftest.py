"""A toy of the embedded model: the whole road from text to outliers in a few seconds."""

from pathlib import Path

import pytest

from bwla_compiler.demo import DemoConfig

TOY = DemoConfig(
    n_files=40,
    held_out=0.2,
    vocab_size=384,
    hidden_size=32,
    intermediate_size=96,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    steps=150,
    batch=4,
    length=32,
    learning_rate=1e-2,
    warmup_steps=10,
)


@pytest.fixture(scope="session")
def toy() -> DemoConfig:
    return TOY


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache shared by the session's tests that only read it."""
    return tmp_path_factory.mktemp("demo-cache")


@pytest.fixture
def shared_cache(toy_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BWLA_CACHE", str(toy_cache))
    return toy_cache


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path))
    return tmp_path

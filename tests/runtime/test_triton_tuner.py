"""The tuner: times the model's best few where it can, remembers it across processes, and says what is modelled."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bwla_compiler.codegen import triton_module
from bwla_compiler.codegen.triton_spec import NO_TILE, LinearKernel, Tile
from bwla_compiler.codegen.triton_tiles import ranked
from bwla_compiler.cost.devices import DEVICES
from bwla_compiler.runtime import triton_tuner

pytestmark = pytest.mark.skipif(not triton_module.installed(), reason="triton is not installed")

SPEC = LinearKernel(5120, (5120,), 1, False, (0,), (False,), (False,), 6, NO_TILE)
X = torch.ones(1, 4)
MODELLED = ranked(SPEC, 8, DEVICES["h100-sxm"])


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path))
    triton_tuner.forget_choices()
    yield tmp_path / "triton" / "tiles.json"
    triton_tuner.forget_choices()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """Stand in for a GPU on which the third tile of the model is the fastest; the list tells what was timed."""
    seen: list[Tile] = []

    def seconds(run: "functools.partial[None]") -> float:
        run()
        (tile,) = run.args
        seen.append(tile)
        return 1.0 if tile == MODELLED[2] else 2.0 + len(seen)

    monkeypatch.setattr(triton_tuner, "_can_time", lambda x: True)
    monkeypatch.setattr(triton_tuner, "seconds_of", seconds)
    return seen


def choose(tokens: int = 8, launched: list[Tile] | None = None) -> Tile:
    run = (lambda tile: None) if launched is None else launched.append
    return triton_tuner.tile_for(SPEC, tokens, X, run)


def test_without_a_gpu_the_model_chooses_and_says_so(fresh: Path) -> None:
    launched: list[Tile] = []
    assert choose(launched=launched) == MODELLED[0]
    assert not launched
    (choice,) = triton_tuner.choices().values()
    assert (choice.how, choice.seconds) == ("modelled", None)
    assert not fresh.exists(), "what was not timed is not kept"


def test_the_best_few_are_timed_once(timed: list[Tile], fresh: Path) -> None:
    launched: list[Tile] = []
    assert choose(launched=launched) == MODELLED[2]
    assert launched == timed == MODELLED[: triton_tuner.TIMED]
    assert choose(5) == MODELLED[2], "5 tokens fall into the same bucket"
    assert len(timed) == triton_tuner.TIMED
    (choice,) = triton_tuner.choices().values()
    assert (choice.how, choice.seconds) == ("timed", 1.0)
    (saved,) = json.loads(fresh.read_text()).values()
    assert saved["tile"]["rows"] == MODELLED[2].rows


def test_another_process_reads_the_table(timed: list[Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    choose()
    triton_tuner.forget_choices()  # as a new process would start
    monkeypatch.setattr(triton_tuner, "_can_time", lambda x: False)
    assert choose() == MODELLED[2]
    assert len(timed) == triton_tuner.TIMED


def test_what_was_modelled_while_tracing_is_timed_at_the_first_launch(
    timed: list[Tile], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as tracing:
        tracing.setattr(triton_tuner, "_can_time", lambda x: False)
        assert choose() == MODELLED[0]
    assert choose() == MODELLED[2]


def test_a_damaged_table_is_told_and_replaced(timed: list[Tile], fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh.parent.mkdir(parents=True)
    fresh.write_text('{"a": {"tile": 3}}')
    assert choose() == MODELLED[2]
    assert "tiles are chosen anew" in caplog.text
    assert len(json.loads(fresh.read_text())) == 1


def test_tables_of_two_kernels_are_joined(timed: list[Tile], fresh: Path) -> None:
    choose(8)
    choose(1)
    assert len(json.loads(fresh.read_text())) == 2


def test_the_environment_turns_timing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_tuner.settings().tune
    monkeypatch.setenv("BWLA_TUNE", "0")
    assert not triton_tuner.settings().tune

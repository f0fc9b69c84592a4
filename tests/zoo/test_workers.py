import os
import time
from collections.abc import Iterator

import pytest

from bwla_compiler.zoo.compiled import Compiled
from bwla_compiler.zoo.run import UNFINISHED, ZooRow
from bwla_compiler.zoo.workers import run_zoo


def job(name: str, seed: int) -> Iterator[ZooRow]:
    """Do what the name says, in a worker."""
    if name == "hangs":
        time.sleep(600)
    if name == "crashes":
        os._exit(7)
    begun = Compiled("refused", "door", UNFINISHED)
    yield ZooRow(name, "exact", reason="begun", captured=True, compiled=begun)
    if name == "compiles for ever":
        time.sleep(600)
    yield ZooRow(name, "exact", reason=f"seed {seed}", captured=True)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_hang_and_a_crash_cost_a_row_each() -> None:
    seen: list[tuple[str, int, int]] = []
    names = ("one", "crashes", "two", "hangs", "compiles for ever")
    # a worker that only imports torch and transformers is up within seconds; loaded machines take longer
    rows = run_zoo(names, seed=5, limit_seconds=60, job=job, progress=lambda *told: seen.append(told))
    assert [row.name for row in rows] == list(names)
    assert [row.status for row in rows] == ["exact", "refused", "exact", "refused", "exact"]
    assert rows[0].reason == "seed 5"
    assert "exit code 7" in rows[1].reason
    assert "no result within 60 s" in rows[3].reason
    assert rows[4].compiled is not None
    assert rows[4].compiled.reason == "no result within 60 s"
    assert rows[4].reason == "begun"
    assert [told[1:] for told in seen] == [(i, 5) for i in range(1, 6)]


@pytest.mark.exhaustive
def test_two_workers_keep_the_order_of_the_names() -> None:
    names = tuple("abcdef")
    assert tuple(row.name for row in run_zoo(names, workers=2, limit_seconds=120, job=job)) == names


def test_nothing_asked_is_nothing_done() -> None:
    assert run_zoo((), job=job) == ()

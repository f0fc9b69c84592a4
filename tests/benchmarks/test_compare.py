"""Comparing results: a slowed kernel is flagged, equal runs and a busy machine are not, other devices are refused."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import timing
from benchmarks.compare import compare
from benchmarks.contest import Contender, contest
from benchmarks.errors import ResultsError
from benchmarks.timing import Times

DEVICE = {"cpu": "x", "cores": 2, "isa": "avx2", "when": "2026-01-01"}


def run(
    scale: dict[str, float], *, machine: float = 1.0, seed: int = 0, cases: int = 3, noise: float = 0.03
) -> list[dict[str, Any]]:
    """Return rows of a made-up run: ways of 100 us times `scale`, each round a few percent longer or shorter."""
    from benchmarks.contest import figures

    generator = random.Random(seed)
    rows = []
    for case in range(cases):
        times = {
            way: Times(tuple(1e-4 * machine * factor * generator.uniform(1 - noise, 1 + noise) for _ in range(15)))
            for way, factor in scale.items()
        }
        for way, found in times.items():
            about = {"linear": f"l{case}", "tokens": 1, "threads": 1, "way": way}
            rows.append({**about, **figures(found, times["bwla A6"], 1000, 1000), **DEVICE})
    return rows


EVEN = {"bwla A6": 1.0, "torch bf16": 3.0, "torch fp32": 5.0, "pure read": 0.5}


def worse(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> set[str]:
    """Return what is flagged."""
    return {change.what for change in compare(old, new) if change.worse}


def test_equal_runs_flag_nothing() -> None:
    for seed in range(1, 20):
        assert worse(run(EVEN), run(EVEN, seed=seed)) == set()


def test_a_slowed_kernel_is_flagged_and_its_peers_are_not() -> None:
    flagged = worse(run(EVEN), run({**EVEN, "bwla A6": 1.3}, seed=1))
    assert flagged == {f"l{i}, 1, 1, bwla A6" for i in range(3)}


def test_a_slow_machine_is_no_regression_and_does_not_hide_one() -> None:
    assert worse(run(EVEN), run(EVEN, machine=1.6, seed=1)) == set()
    flagged = worse(run(EVEN), run({**EVEN, "bwla A6": 1.3}, machine=1.6, seed=1))
    assert flagged == {f"l{i}, 1, 1, bwla A6" for i in range(3)}


def test_what_became_faster_is_better_and_noise_widens_what_is_allowed() -> None:
    changes = compare(run(EVEN), run({**EVEN, "bwla A6": 0.7}, seed=1))
    assert {c.what for c in changes if c.better} == {f"l{i}, 1, 1, bwla A6" for i in range(3)}
    assert worse(run(EVEN, noise=0.4), run({**EVEN, "bwla A6": 1.2}, seed=1, noise=0.4)) == set()


def test_rates_count_the_other_way_round_and_bits_are_compared_as_they_are() -> None:
    old = [{"model": "m", "way": "bwla", "decode_tokens_per_second": 100.0, "true_bits": 1.1, **DEVICE}]
    new = [{"model": "m", "way": "bwla", "decode_tokens_per_second": 80.0, "true_bits": 1.2, **DEVICE}]
    assert {(c.metric, c.worse) for c in compare(old, new)} == {("decode_tokens_per_second", True), ("true_bits", True)}
    assert not any(c.worse for c in compare(new, old))


NEAR = {"a6_kl": 0.05, "a6_top1": 0.9, "a6_task": 0.6, "a4_kl": 0.09, "a4_top1": 0.8, "a4_task": 0.5}


@pytest.mark.parametrize(
    "name, value, verdict",
    [
        ("a6_kl", 0.06, "worse"),
        ("a4_kl", 0.08, "better"),
        ("a6_top1", 0.88, "worse"),
        ("a4_top1", 0.82, "better"),
        ("a6_task", 0.55, "worse"),
        ("a4_task", 0.55, "better"),
        ("a6_task", 0.59, "the same"),  # some questions more or less are none
        ("a6_top1", 0.0, "worse"),  # nothing at all is a figure too
        ("a6_task", 0.0, "worse"),
    ],
)
def test_divergence_is_better_low_and_agreement_high(name: str, value: float, verdict: str) -> None:
    about = {"model": "demo", "way": "ours", "table": "ours", **DEVICE}
    changes = compare([{**about, **NEAR}], [{**about, **NEAR, name: value}])
    assert {c.metric for c in changes} == set(NEAR)
    wanted = {name} if verdict != "the same" else set()
    assert {c.metric for c in changes if c.worse or c.better} == wanted
    assert all(c.worse == (verdict == "worse") for c in changes if c.metric in wanted)


def test_rows_from_before_a_column_was_measured_are_compared_in_what_they_have() -> None:
    about = {"model": "demo", "way": "ours", "table": "ours", "a6": 1.06, **DEVICE}
    assert [c.metric for c in compare([about], [{**about, **NEAR}])] == ["a6"]
    nothing_lost = {**about, "a6_kl": 0.0}  # a float model beside itself: no change is relative to nothing
    assert [c.metric for c in compare([nothing_lost], [{**about, **NEAR}])] == ["a6"]


def test_other_devices_and_other_rows_are_refused() -> None:
    old = run(EVEN)
    with pytest.raises(ResultsError, match="different devices cannot be compared: x, 2 cores, avx2; y, 2 cores, avx2"):
        compare(old, [{**row, "cpu": "y"} for row in old])
    later = [{**row, "cpu": "y", "when": "2026-02-01"} for row in old]
    assert not any(change.worse for change in compare([*later, *old], [*old, *later]))
    with pytest.raises(ResultsError, match="different devices"):
        compare(old, [*old, *later])
    with pytest.raises(ResultsError, match="no row is in both"):
        compare(old, [{**row, "linear": "other"} for row in old])


def test_a_kernel_that_was_slowed_is_flagged_from_its_timing_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole road from calls to the verdict, on a clock that only the calls move."""
    now, generator = [0.0], random.Random(0)

    def takes(seconds: float) -> Callable[[], object]:
        def call() -> None:
            now[0] += seconds * generator.uniform(0.95, 1.05)

        return call

    def measured(ours: float) -> list[dict[str, Any]]:
        contenders = {"bwla A6": ours, "torch bf16": 1e-3, "torch fp32": 1.5e-3}
        calls = {way: Contender([takes(seconds)] * 3, 1000) for way, seconds in contenders.items()}
        rows = contest(calls, ours="bwla A6", macs=1, rounds=9)
        return [{"linear": "l", "tokens": 1, "threads": 1, **row, **DEVICE} for row in rows]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert worse(measured(1e-3), measured(1.2e-3)) == {"l, 1, 1, bwla A6"}
    assert worse(measured(1e-3), measured(1e-3)) == set()

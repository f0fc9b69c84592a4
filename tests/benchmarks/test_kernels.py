"""Timing of kernels: turns and ratios, cold copies, and that a wrong kernel is not timed."""

import pytest
import torch

from benchmarks import kernels
from benchmarks.timing import COLD_BYTES, Times, copies, interleaved


def test_every_contender_runs_every_copy_each_round_and_takes_turns_to_start() -> None:
    seen: list[str] = []
    calls = {name: [lambda n=name, i=i: seen.append(f"{n}{i}") for i in range(2)] for name in "ab"}
    times = interleaved(calls, rounds=3)
    assert seen == ["a0", "a1", "b0", "b1", "b0", "b1", "a0", "a1"] * 2
    assert all(len(t.seconds) == 3 for t in times.values())  # the first round warms up


def test_ratios_are_of_one_round_and_not_of_two() -> None:
    ours, theirs = Times((1.0, 10.0, 2.0)), Times((2.0, 20.0, 4.0))
    assert ours.ratio(theirs) == 2
    assert ours.median == 2
    assert Times((1.0, 1.0, 1.0)).spread == 0


def test_copies_go_beyond_the_cache() -> None:
    assert copies(1 << 20) * (1 << 20) >= COLD_BYTES
    assert copies(1 << 40) == 2


def test_a_case_holds_ours_torch_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.COLD_BYTES", 1)
    monkeypatch.setattr(kernels, "ROUNDS", 3)
    with torch.no_grad():
        rows = kernels._case("tiny", (24, 64), tokens=1, threads=1)
    found = {row["way"]: row for row in rows}
    assert {"bwla A8", "bwla A6", "bwla A4", "torch bf16", "torch fp32", "pure read"} <= set(found)
    assert found["bwla A6"]["times_bwla_a6"] == 1
    assert all(row["us"] > 0 for row in rows)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.COLD_BYTES", 1)
    call = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda linear, x: lambda: 1.001 * call(linear, x)())
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"bwla A8.*is wrong by 1\.0e-03.*not timed"):
        kernels._case("tiny", (24, 64), tokens=2, threads=1)

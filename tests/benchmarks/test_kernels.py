"""Timing of kernels: turns and ratios, cold copies, and that a wrong kernel is not timed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ceilings, kernels, transforms
from benchmarks.errors import RefusedError
from benchmarks.timing import Times, cold_bytes, copies, in_turn, interleaved, last_cache_bytes, quartiles


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
    assert copies(1 << 20) * (1 << 20) >= cold_bytes()
    assert copies(1 << 40) == 2


def test_the_last_cache_is_the_largest_that_the_system_names(tmp_path: Path) -> None:
    for i, size in enumerate(("32K", "2048K", "300M")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    assert last_cache_bytes(tmp_path) == 300 << 20
    assert last_cache_bytes(tmp_path / "nothing") == 0


def test_quartiles_are_of_the_rounds() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 4)
    assert quartiles([3.0]) == (3, 3)
    assert Times((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(1 / 3)


def test_what_is_measured_in_turn_comes_back_by_name() -> None:
    counted = iter(range(100))
    found = in_turn({"a": lambda: next(counted), "b": lambda: -next(counted)}, rounds=2)
    assert found == {"a": [3, 4], "b": [-2, -5]}


def test_a_case_holds_ours_torch_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.cold_bytes", lambda: 1)
    monkeypatch.setattr(kernels, "ROUNDS", 3)
    with torch.no_grad():
        rows = kernels._case("tiny", (24, 64), tokens=1, threads=1)
    found = {row["way"]: row for row in rows}
    assert {"bwla A8", "bwla A6", "bwla A4", "torch bf16", "torch fp32", "pure read"} <= set(found)
    assert found["bwla A6"]["times_ours"] == 1
    assert all(0 < row["us_low"] <= row["us"] <= row["us_high"] for row in rows)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a_wrong_kernel_is_not_timed(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.cold_bytes", lambda: 1)
    call, timed = kernels._call, []

    def slightly_wrong(linear: Any, x: torch.Tensor) -> Any:
        return (lambda: 1.001 * call(linear, x)()) if linear.activation_bits == bits else call(linear, x)

    monkeypatch.setattr(kernels, "_call", slightly_wrong)
    monkeypatch.setattr(kernels, "contest", lambda contenders, **_: timed.append(contenders))
    with torch.no_grad(), pytest.raises(RefusedError, match=rf"bwla A{bits}.*is wrong by 1\.0e-03.*not timed"):
        kernels._case("tiny", (24, 64), tokens=2, threads=1)
    assert not timed


def test_a_peer_whose_product_is_wrong_is_not_timed_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.cold_bytes", lambda: 1)
    x = torch.ones(2, 64)
    monkeypatch.setattr(kernels.nn.functional, "linear", lambda x, weight: x @ weight.T + torch.nan)
    with pytest.raises(RefusedError, match=r"torch torch\.float32 is wrong by nan.*not timed"):
        kernels._torch(torch.ones(24, 64), x)


def test_without_ggml_a_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_cases", lambda quick: [])
    monkeypatch.setattr(kernels, "ggml", lambda: None)
    assert kernels.measure(lambda *_: None) == [
        {"linear": "", "way": "ggml", "missing": "llama-cpp-python is not installed"}
    ]
    monkeypatch.setattr(kernels, "ggml", object)
    assert kernels.measure(lambda *_: None) == []


def test_ceilings_are_positive_and_a_transform_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "cold_bytes", lambda: 1 << 20)
    monkeypatch.setattr(ceilings, "FLOAT_REPEATS", 1000)
    monkeypatch.setattr(ceilings, "INT8_REPEATS", 1000)
    found = {row["way"]: row for row in ceilings.measure_ceilings(1)}
    assert {"pure read", "pure copy", "float32 multiply-adds"} <= set(found)
    assert all(row.get("gb_per_second", row.get("gmac_per_second")) > 0 for row in found.values())
    monkeypatch.setattr("benchmarks.timing.cold_bytes", lambda: 1)
    with torch.no_grad():
        rows = transforms.transform_rows(96, 2, 1, rounds=2)
        assert [row["way"] for row in rows] == ["bwla Kronecker", "torch dense fp32"]
        reference = transforms._reference
        monkeypatch.setattr(transforms, "_reference", lambda t, x: reference(t, x) + 0.01)
        with pytest.raises(RefusedError, match="Kronecker 8 x 12 is wrong"):
            transforms.transform_rows(96, 2, 1, rounds=2)


def test_cases_measure_the_ceilings_first_on_each_number_of_threads() -> None:
    for quick in (True, False):
        cases = kernels._cases(quick)
        for threads in (1, 2):
            assert next(c for c in cases if c[2] == threads)[0] == kernels.CEILING
        assert len(cases) == len(set(cases))

"""Timing of kernels: turns and ratios, cold copies, and that a wrong kernel is not timed."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import ceilings, forced_isa, kernel_peers, kernels, prologues, timing, transforms
from benchmarks.budget import LEFT_OUT, Budget
from benchmarks.contest import Contender, contest
from benchmarks.errors import RefusedError, ResultsError
from benchmarks.ggml import ggml
from benchmarks.record import context
from benchmarks.tiles import KeptTiles
from benchmarks.timing import Times, cold_bytes, copies, in_turn, interleaved, last_cache_bytes, quartiles
from bwla_compiler.codegen.isa import best_isa, cpu_flags


def test_every_contender_runs_every_copy_each_round_and_takes_turns_to_start() -> None:
    seen: list[str] = []
    calls = {name: [lambda n=name, i=i: seen.append(f"{n}{i}") for i in range(2)] for name in "ab"}
    times = interleaved(calls, rounds=3)
    assert seen == ["a0", "a1", "b0", "b1"] + ["a0", "a1", "b0", "b1", "b0", "b1", "a0", "a1"] * 2
    assert all(len(t.seconds) == 3 for t in times.values())  # the first round warms up


def test_a_turn_ends_in_time_and_the_next_goes_on_with_the_next_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], list[int]()

    def call(i: int, seconds: float) -> None:
        seen.append(i)
        now[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    turn = timing.Rotation([partial(call, i, 0.015) for i in range(3)])
    assert [turn(), turn()] == pytest.approx([0.015, 0.015])
    assert seen == [0, 1, 2, 0]
    long = timing.Rotation([partial(call, 9, 1.0)] * 2)
    assert long() == 1  # one call at least


def test_a_call_of_several_products_is_shared_among_them() -> None:
    calls = {"one": Contender([lambda: None], 8), "ten": Contender([lambda: None], 8, products=10, version="v")}
    one, ten = contest(calls, ours="one", macs=1, rounds=2)
    assert ten["us"] <= one["us"]
    assert (ten["version"], "version" in one) == ("v", False)


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
        rows = kernels._case("tiny", (24, 64), tokens=1, threads=1, peers=("torch bf16", "torch fp32"))
    found = {row["way"]: row for row in rows}
    assert set(found) == {"bwla A8", "bwla A6", "bwla A4", "torch bf16", "torch fp32", "pure read"}
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
        kernels._case("tiny", (24, 64), tokens=2, threads=1, peers=())
    assert not timed


def test_a_peer_that_is_wrong_or_fails_is_not_timed_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(product: kernel_peers.Product) -> Contender:
        raise ValueError("no\ntemplate")

    monkeypatch.setattr("benchmarks.timing.cold_bytes", lambda: 1)
    monkeypatch.setattr(kernels, "ROUNDS", 2)
    monkeypatch.setattr(kernel_peers.nn.functional, "linear", lambda x, weight: x @ weight.T + torch.nan)
    monkeypatch.setitem(kernels.PEERS, "torch bf16", kernel_peers.Peer(broken))
    with torch.no_grad():
        rows = kernels._case("tiny", (24, 64), tokens=2, threads=1, peers=("torch bf16", "torch fp32"))
    said = {row["way"]: row for row in rows if "us" not in row}
    assert said["torch bf16"]["failed"] == "ValueError: no template"
    assert "torch.float32 is wrong by nan" in said["torch fp32"]["refused"]
    assert {row["way"] for row in rows if "us" in row} == {"bwla A8", "bwla A6", "bwla A4"}


@pytest.mark.slow
def test_inductor_computes_all_copies_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.cold_bytes", lambda: 1)
    weight, x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((32, 64), (3, 64)))
    with torch.no_grad():
        product = kernel_peers.Product(weight, x, x.double() @ weight.double().T, 1)
        found = kernel_peers.PEERS["inductor bf16"].make(product)
        assert (len(found.calls), found.products, found.n_bytes) == (1, 2, 2 * 32 * 64)
        result: Any = found.calls[0]()
        assert len(result) == 2
        with pytest.raises(RefusedError, match="inductor bf16 is wrong"):
            kernel_peers.PEERS["inductor bf16"].make(replace(product, y=-product.y))
    torch._dynamo.reset()


@pytest.mark.skipif(ggml() is None, reason="llama-cpp-python is not installed")
def test_ggml_computes_with_copies_of_what_it_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.cold_bytes", lambda: 1)
    weight, x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((8, 256), (2, 256)))
    product = kernel_peers.Product(weight, x, x.double() @ weight.double().T, 1)
    found = kernel_peers.by_ggml(product, kind="Q4_0")
    first, second = (call() for call in found.calls)
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert torch.equal(first, second)
    assert found.n_bytes == 8 * 256 * 18 // 32
    with pytest.raises(ResultsError, match="rows of 40 are no whole blocks"):
        kernel_peers.by_ggml(replace(product, weight=weight[:, :40]), kind="Q4_0")


def test_peers_that_are_not_there_or_not_asked_for_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_cases", lambda *_: [])
    monkeypatch.setattr(kernel_peers, "ggml", lambda: None)
    rows = kernels.measure(lambda *_: None, peers=kernel_peers.SHORT)
    said = {row["way"]: row["missing"] for row in rows}
    assert said["ggml Q1_0"] == "llama-cpp-python is not installed"
    assert said["ggml BF16"] == said["torch fp32"] == "not in a short run"
    assert not {"torch bf16", "inductor bf16"} & said.keys()
    assert kernels.measure(lambda *_: None, peers=("torch bf16",)) == []


def test_cases_that_a_budget_leaves_out_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 4))
    monkeypatch.setattr(kernels, "_measured", lambda case, peers: [{"linear": case[0], "us": 1.0}])
    budget = Budget(16, clock=lambda: float(next(now)))
    rows = kernels.measure(lambda *_: None, shapes=("8B gate",), tokens=(1,), peers=tuple(kernels.PEERS), budget=budget)
    left = [row for row in rows if row.get("missing") == LEFT_OUT]
    assert left
    assert {"linear": "8B gate", "way": "", "tokens": 1, "threads": 2, "missing": LEFT_OUT} in left


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
        assert [row["way"] for row in rows] == ["bwla Kronecker", "bwla Kronecker, Hadamard", "torch dense fp32"]
        reference = transforms._reference
        monkeypatch.setattr(transforms, "_reference", lambda t, x: reference(t, x) + 0.01)
        with pytest.raises(RefusedError, match="Kronecker of 96 is wrong"):
            transforms.transform_rows(96, 2, 1, rounds=2)


def test_what_a_linear_waits_for_is_a_share_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "whole": Times((13.0, 15.0)), "without": Times((10.5, 11.0)), "again": Times((11.5, 13.0)),
        "rounding": Times((1.0 * prologues.ROUNDED_AT_ONCE, 2.0 * prologues.ROUNDED_AT_ONCE)),
    }  # fmt: skip
    found = prologues._shares(times)
    assert (found["us"], found["rounding_us"], found["linear_us"]) == (
        4e6,
        1.5e6,
        10e6,
    )  # of 3 and 5, 1 and 2, 10 and 10
    assert found["control_us"] == 1.5e6
    assert (found["share"], found["share_low"], found["share_high"]) == (0.4, 0.35, 0.45)


@pytest.mark.parametrize("heads", [0, 4])
def test_a_prologue_is_checked_before_it_is_timed(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.cold_bytes", lambda: 1)
    monkeypatch.setitem(prologues.SERVED, "tiny", prologues.Served((24, 96), heads))
    with torch.no_grad():
        [row] = prologues.prologue_rows("tiny", 1, rounds=2)
        assert row["linear"] == "prologue of tiny"
        assert row["rounding_us"] > 0
        monkeypatch.setattr(prologues, "_reference", lambda *_: torch.ones(1, 24, dtype=torch.float64))
        with pytest.raises(RefusedError, match="prologue of tiny is wrong"):
            prologues.prologue_rows("tiny", 1, rounds=2)


def test_what_decides_comes_first_under_ceilings_of_the_same_run() -> None:
    cases = kernels._cases((), (), ())
    assert len(cases) == len(set(cases))
    assert [case[2] for case in cases[:2]] == [1, 2]
    assert {case[0] for case in cases[:2]} == {kernels.CEILING}
    deciding = {(name, m, n) for name in kernels.FIRST_SHAPES for m in (1, 128) for n in (1, 2)}
    assert set(cases[2:14]) == deciding
    assert cases[14][0].startswith(kernels.TRANSFORM)
    assert cases[-1] == ("32B down", 4, 1)


def test_shapes_tokens_and_threads_can_be_chosen() -> None:
    assert kernels._cases(("8B gate",), (16,), (2,)) == [(kernels.CEILING, 0, 2), ("8B gate", 16, 2)]
    assert kernels._cases(("transform of 4096",), (1,), (1,))[1:] == [("transform of 4096", 1, 1)]
    assert kernels._cases(("prologue of 8B o",), (1, 8), (1,))[1:] == [("prologue of 8B o", 1, 1)]
    with pytest.raises(ResultsError, match=r"no shape is called '9B'; there are: 0\.6B q"):
        kernels._cases(("9B",), (), ())


def test_kernels_are_held_to_an_instruction_set_that_this_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forced_isa.load, "cache_info", lambda: SimpleNamespace(currsize=0))
    best = best_isa()
    with forced_isa.held_to("portable"):
        assert context([])["isa"] == "portable"
    with forced_isa.held_to(""):
        assert best_isa() == best
    assert best_isa() == best
    with (
        pytest.raises(ResultsError, match=r"no instruction set 'sse' here; there are: .*portable"),
        forced_isa.held_to("sse"),
    ):
        pass
    monkeypatch.setattr(forced_isa.load, "cache_info", lambda: SimpleNamespace(currsize=1))
    with pytest.raises(ResultsError, match="needs a process of its own"), forced_isa.held_to("portable"):
        pass


@pytest.mark.skipif("amx_tile" not in cpu_flags(), reason="this processor has no tiles")
def test_tiles_are_laid_out_again_as_they_were_kept() -> None:
    """One tile of 16 rows of 64 bytes is not what another library leaves; seen by keeping what is there."""
    ours, found = KeptTiles(), KeptTiles()
    ours._layout[0], ours._layout[16], ours._layout[48] = 1, 64, 16  # palette, width of the first tile, its rows
    ours.restore()
    found.keep()
    assert bytes(found._layout) == bytes(ours._layout)
    half = torch.randn(64, 64, dtype=torch.bfloat16)
    torch.mm(half, half)  # oneDNN's own layout, given back or not
    ours.restore()
    found.keep()
    assert bytes(found._layout) == bytes(ours._layout)

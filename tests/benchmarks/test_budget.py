"""Budgets leave out what would not fit; noise is read; threads come back."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.budget import Budget
from benchmarks.noise import Noise, cpu_times, pinned, steal_share


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_cases_are_begun_while_the_longest_would_fit_again() -> None:
    clock = Clock()
    budget = Budget(10, clock=clock)
    done = []
    for case in budget.within([4, 1, 3, 3]):
        done.append(case)
        clock.now += case
    assert done == [4, 1, 3]  # 8 seconds are gone, and a fourth case may take as long as the first: 4
    assert budget.left_out == [3]


def test_cases_of_a_kind_are_expected_to_take_what_their_like_took() -> None:
    clock = Clock()
    budget = Budget(21, clock=clock)
    done = []
    for case in budget.within([9, 1, 9, 1, 9, 1], like=lambda case: case > 5):
        done.append(case)
        clock.now += case
    assert done == [9, 1, 9, 1, 1]  # a second is left: too little for another 9, and enough for another 1
    assert budget.left_out == [9]


def test_the_first_case_always_runs_and_no_limit_runs_all() -> None:
    clock = Clock()
    spent = Budget(0, clock=clock)
    assert list(spent.within("abc")) == ["a", "b", "c"]  # no time passes, so each fits again
    late = Budget(1, clock=clock)
    done = []
    for case in late.within([5, 5]):
        done.append(case)
        clock.now += case
    assert done == [5]
    assert list(Budget(clock=clock).within([1, 2])) == [1, 2]


def test_a_part_is_of_what_is_left() -> None:
    clock = Clock()
    budget = Budget(100, clock=clock)
    clock.now = 40
    assert budget.part(0.5).left == 30


def test_steal_is_a_share_of_the_time_between(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 50 800 10 0 5 35 0 0\ncpu0 1 1 1 1\n")
    before = cpu_times(stat)
    stat.write_text("cpu  150 0 50 840 10 0 5 45 0 0\n")
    assert steal_share(before, cpu_times(stat)) == pytest.approx(10 / 100)
    assert cpu_times(tmp_path / "absent") == ()
    assert steal_share((), ()) is None
    assert set(Noise().fields()) == {"steal", "load_before", "load_after"}


def test_threads_and_cores_are_held_and_given_back() -> None:
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with pinned(1):
        assert torch.get_num_threads() == 1
        assert len(os.sched_getaffinity(0)) == 1
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)

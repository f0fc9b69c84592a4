"""Jobs side by side: order, threads, progress, and what becomes of errors, deaths and interrupts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bwla_compiler.errors import CalibrationError, WorkerError
from bwla_compiler.workers import Progress, side_by_side


def threads_and_process(name: str, progress: Progress) -> tuple[str, int, int]:
    for done in range(4):
        progress(name, done + 1, 4)
    return name, torch.get_num_threads(), os.getpid()


def fail_or_wait(name: str, progress: Progress) -> None:
    if name == "bad":
        raise CalibrationError("tokens: none at all; give some")
    time.sleep(600)  # the other's error must not wait for this


def break_or_wait(name: str, progress: Progress) -> None:
    if name == "bad":
        raise ZeroDivisionError("of nothing")
    time.sleep(600)


def die_or_wait(name: str, progress: Progress) -> None:
    if name == "bad":
        os._exit(9)
    time.sleep(600)


def test_each_job_has_a_process_and_its_share_of_the_threads() -> None:
    seen: list[tuple[str, int, int]] = []
    found = side_by_side(
        threads_and_process, ("a", "b"), label="both", threads=5, progress=lambda *told: seen.append(told)
    )
    assert [(name, threads) for name, threads, _ in found] == [("a", 2), ("b", 2)]
    assert len({os.getpid(), *(process for *_, process in found)}) == 3
    assert {(label, total) for label, _, total in seen} == {("both", 100)}
    shares = [done for _, done, _ in seen]
    assert len(shares) == 8
    assert shares == sorted(shares)
    assert shares[-1] == 100


def test_with_one_thread_jobs_run_here_in_turn() -> None:
    seen: list[int] = []
    found = side_by_side(
        threads_and_process, ("a", "b"), label="both", threads=1, progress=lambda label, done, total: seen.append(done)
    )
    assert {process for *_, process in found} == {os.getpid()}
    assert [name for name, *_ in found] == ["a", "b"]
    assert seen == [12, 25, 38, 50, 62, 75, 88, 100]


def test_an_error_of_a_worker_is_raised_as_itself_and_ends_the_others() -> None:
    with pytest.raises(CalibrationError, match=r"^tokens: none at all; give some$"):
        side_by_side(fail_or_wait, ("slow", "bad"), label="both", threads=2)


@pytest.mark.exhaustive
def test_an_unforeseen_error_brings_the_workers_trace() -> None:
    with pytest.raises(RuntimeError, match=r"worker of bad failed(.|\n)*ZeroDivisionError: of nothing"):
        side_by_side(break_or_wait, ("slow", "bad"), label="both", threads=2)


def test_a_dead_worker_is_named() -> None:
    with pytest.raises(WorkerError, match="worker process of bad ended early"):
        side_by_side(die_or_wait, ("slow", "bad"), label="both", threads=2)


SCRIPT = """
import os
from tests.test_workers import note_and_wait
from bwla_compiler.workers import side_by_side

if __name__ == "__main__":
    side_by_side(note_and_wait, ("a", "b"), label="both", threads=2, progress=lambda *told: print("told", flush=True))
"""


def note_and_wait(name: str, progress: Progress) -> None:
    progress(name, 1, 2)
    time.sleep(600)


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a process group")
def test_an_interrupt_ends_all_without_a_word_of_the_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    running = subprocess.Popen(
        [sys.executable, str(script)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in background jobs
    )
    assert running.stdout is not None
    assert [running.stdout.readline() for _ in "ab"] == [b"told\n"] * 2  # both workers are at work
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, said = running.communicate(timeout=60)
    assert said.decode().count("Traceback") == 1  # the script's own
    assert "KeyboardInterrupt" in said.decode()
    for _ in range(100):  # the interpreter's own resource tracker leaves a moment after its last client
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process of the group is still there")

"""Jobs side by side: one worker process each, the machine's threads shared out, their progress seen as one."""

import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from bwla_compiler.errors import BwlaError, WorkerError

Progress = Callable[[str, int, int], None]
Job = Callable[[str, Progress], Any]


def side_by_side(
    job: Job, names: Sequence[str], *, label: str, threads: int | None = None, progress: Progress | None = None
) -> list[Any]:
    """Return [job(name, progress) for name in names], each run in a process of its own.

    job: a function of a module, or a partial of one, whose results pickle; its progress counts once for the whole
    of it. threads: shared out evenly, torch's number by default; where there are fewer than names, the jobs run
    here, one after another. progress: sees `label`, percent done, 100. The first error of a job ends all workers
    and is raised here as itself; WorkerError where a worker died without one.
    """
    threads = threads or torch.get_num_threads()
    shares = dict.fromkeys(names, 0.0)

    def tell(name: str, done: int, total: int) -> None:
        shares[name] = done / max(1, total)
        if progress is not None:
            progress(label, round(100 * sum(shares.values()) / len(shares)), 100)

    if threads < len(names) or len(names) == 1:
        return [job(name, _telling(name, tell)) for name in names]
    with _workers(job, names, threads // len(names)) as pipes:
        return _results(pipes, tell)


def _telling(name: str, tell: Callable[[str, int, int], None]) -> Progress:
    return lambda label, done, total: tell(name, done, total)


@contextmanager
def _workers(job: Job, names: Sequence[str], threads: int) -> Iterator[dict[Connection, str]]:
    """Start a process for each name; give the pipes that they write to, and end those that still run."""
    context = get_context("spawn")  # a forked child would inherit torch's thread pool without its threads
    pipes: dict[Connection, str] = {}
    processes: list[SpawnProcess] = []
    try:
        with _deaf_to_interrupts():
            for name in names:
                here, there = context.Pipe(duplex=False)
                pipes[here] = name
                process = context.Process(target=_work, args=(job, name, threads, warnings.filters, there), daemon=True)
                processes.append(process)
                process.start()
                there.close()  # the worker's copy is then the last: its end is seen here as the end of the file
        yield pipes
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()
        for pipe in pipes:
            pipe.close()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which a terminal sends to them too: who started them ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's alone to set
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(job: Job, name: str, threads: int, filters: Sequence[Any], pipe: Connection) -> None:
    """Run a job in a worker: send ("progress", (done, total)) and then ("result", it) or ("error", it)."""
    torch.set_num_threads(threads)
    warnings.filters[:] = filters  # type: ignore[index]
    try:
        result = job(name, lambda _, done, total: pipe.send(("progress", (done, total))))
        pipe.send(("result", result))
    except BwlaError as error:
        pipe.send(("error", error))
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        pipe.send(("error", RuntimeError(f"the worker of {name} failed:\n{trace}")))


def _results(pipes: dict[Connection, str], tell: Callable[[str, int, int], None]) -> list[Any]:
    """Return every worker's result, in order, as they arrive."""
    results: dict[str, Any] = {}
    open_pipes = dict(pipes)
    while open_pipes:
        for pipe in wait(list(open_pipes)):
            assert isinstance(pipe, Connection)
            name = pipes[pipe]
            try:
                kind, content = pipe.recv()
            except EOFError:
                raise WorkerError(
                    f"the worker process of {name} ended early. Was it killed for want of memory? Free some, or set "
                    "OMP_NUM_THREADS=1 to work without workers. Is this a script? Start it by "
                    'if __name__ == "__main__", since workers import it'
                ) from None
            if kind == "error":
                raise content
            if kind == "progress":
                tell(name, *content)
            else:
                results[name] = content
                del open_pipes[pipe]
    return [results[name] for name in pipes.values()]

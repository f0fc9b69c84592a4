"""Rows by worker processes: an architecture that hangs or crashes costs its own row and a new process, no more."""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from bwla_compiler.zoo.extent import Extent
from bwla_compiler.zoo.journal import Journal
from bwla_compiler.zoo.run import ZooRow, interrupted, zoo_rows

Progress = Callable[[str, int, int], None]
Job = Callable[[str, int], Iterable[ZooRow]]

MAX_WORKERS = 2
ROWS_A_PROCESS = 40
"""After so many rows a process is replaced: models and traces leave memory behind."""


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    name: str = ""
    latest: ZooRow | None = None
    started: float = 0.0
    n_rows: int = 0


def run_zoo(
    names: Sequence[str],
    *,
    seed: int = 0,
    extent: Extent = Extent.NONE,
    limit_seconds: float = 300.0,
    workers: int = 1,
    progress: Progress | None = None,
    job: Job | None = None,
    keep: Journal | None = None,
) -> tuple[ZooRow, ...]:
    """Return the rows of architectures, in the order of their names.

    extent: how far each is compiled, see `zoo_rows`. limit_seconds: wall time that one may take; beyond it its process
    is ended and the row says so. workers: processes side by side, 1 or 2. job: what gives the rows of (name, seed),
    each in place of the one before, `zoo_rows` by default; a function of a module, or a partial of one. progress: sees
    each name as it ends. keep: rows that it has are not made again, and every new one is added at once.
    """
    assert 1 <= workers <= MAX_WORKERS
    job = job or partial(zoo_rows, extent=extent)
    chosen = list(dict.fromkeys(names))
    kept = keep.rows() if keep is not None else {}
    rows = {name: kept[name] for name in chosen if name in kept}
    waiting = [name for name in chosen if name not in rows]
    crew = [_start(job, seed) for _ in range(min(workers, len(waiting)))]
    try:
        while waiting or any(w.name for w in crew):
            _give(crew, waiting)
            for i, worker in enumerate(crew):
                if (row := _collect(worker, limit_seconds)) is None:
                    continue
                rows[row.name] = row
                if keep is not None:
                    keep.add(row)
                if progress is not None:
                    progress(row.name, len(rows), len(chosen))
                worker.name, worker.n_rows = "", worker.n_rows + 1
                if waiting and (not worker.process.is_alive() or worker.n_rows >= ROWS_A_PROCESS):
                    _end(worker)
                    crew[i] = _start(job, seed)
            wait([w.pipe for w in crew if w.name], timeout=0.5)
    finally:
        for worker in crew:
            _end(worker)
    return tuple(rows[name] for name in chosen)


def _start(job: Job, seed: int) -> _Worker:
    context = get_context("spawn")  # a forked child would inherit torch's thread pool without its threads
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(job, seed, there), daemon=True)
    process.start()
    there.close()  # the worker's copy is then the last: its end is seen here as the end of the file
    return _Worker(process, here)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _work(job: Job, seed: int, pipe: Connection) -> None:
    """In a worker: answer each name with its rows, and None after the last."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with redirect_stderr(StringIO()):  # rows say what goes wrong; the backend's own bars would fight with the caller's
        while True:
            try:
                name = pipe.recv()
            except EOFError:
                return
            for row in job(name, seed):
                pipe.send(row)
            pipe.send(None)


def _give(crew: list[_Worker], waiting: list[str]) -> None:
    for worker in crew:
        if waiting and not worker.name:
            worker.name, worker.latest, worker.started = waiting.pop(0), None, time.perf_counter()
            worker.pipe.send(worker.name)


def _collect(worker: _Worker, limit_seconds: float) -> ZooRow | None:
    """Return the row of a worker that is done, dead or late; None where it is none of these."""
    if not worker.name:
        return None
    seconds = time.perf_counter() - worker.started
    try:
        while worker.pipe.poll():
            row = worker.pipe.recv()
            if row is None:
                return worker.latest
            worker.latest = row
    except (EOFError, ConnectionResetError):
        worker.process.join()
        reason = f"its process died with exit code {worker.process.exitcode}"
        return interrupted(worker.latest, worker.name, reason, seconds=seconds)
    if seconds <= limit_seconds:
        return None
    _end(worker)
    return interrupted(worker.latest, worker.name, f"no result within {limit_seconds:g} s", seconds=seconds)

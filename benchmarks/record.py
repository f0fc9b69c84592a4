"""Results as JSON lines: each with the device, versions, commit and command that it came from."""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import bwla_compiler
from benchmarks.errors import ResultsError
from bwla_compiler.codegen.isa import ISAS, best_isa
from bwla_compiler.inspector.machine import cpu_model

HERE = Path(__file__).parent
RESULTS = HERE / "results"

Row = dict[str, Any]

CONTEXT = (
    "cpu", "cores", "isa", "gpu", "load", "python", "torch", "transformers", "bwla_compiler", "commit", "command",
    "when",
)  # fmt: skip
"""Columns that `record` adds; all others were measured, or say what was."""


def record(name: str, rows: Sequence[Mapping[str, Any]], *, command: Sequence[str], folder: Path = RESULTS) -> Path:
    """Append rows to FOLDER/<name>.jsonl and return the file. command: what was given after `python -m benchmarks`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    about = context(command)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, **about}) + "\n")
    return path


def read(path: Path) -> list[Row]:
    """Return a file's rows. Raises ResultsError where it is absent or holds anything but JSON lines."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError as error:
        raise ResultsError(f"{path}: there is no such file of results") from error
    except ValueError as error:
        raise ResultsError(f"{path}: is no file of JSON lines ({error})") from error
    return rows


def latest(rows: Sequence[Row], *, by: Sequence[str]) -> list[Row]:
    """Return the last row of each combination of these columns and of the device, in the order of the first ones.

    A row that says why there are no figures ("missing") does not hide an earlier one that has them.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (device(row), *(row.get(column) for column in by))
        if "missing" not in row or "missing" in found.get(key, row):
            found[key] = row
    return [*found.values()]


def last_runs(rows: Sequence[Row], *, by: Sequence[str]) -> list[Row]:
    """Return of each combination of these columns and of the device all rows of the run that recorded it last.

    What is compared within a case was then measured in the same rounds; cases may be of different runs.
    """

    found: list[Row] = []
    for mine in devices(rows):
        for case in grouped(mine, by=by).values():
            last = max(str(row["when"]) for row in case)
            found += [row for row in case if row["when"] == last]
    return found


def grouped(rows: Sequence[Row], *, by: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows of each combination of these columns (None where a row lacks one), in the order of the rows."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(column) for column in by), []).append(row)
    return found


def machine(row: Row) -> str:
    """Return the machine that a row was measured on, whatever instruction set its kernels were held to."""
    gpu = f", {row['gpu']}" if row.get("gpu") else ""
    return f"{row['cpu']}, {row['cores']} cores{gpu}"


def device(row: Row) -> str:
    """Return what a row was measured on: figures of different devices are never set side by side."""
    return f"{machine(row)}, {row['isa']}"


def one_device(rows: Sequence[Row], *, what: str) -> str:
    """Return the device of all rows. Raises ResultsError where there is more than one, or no row."""
    found = sorted({device(row) for row in rows})
    if len(found) != 1:
        listed = "; ".join(found) or "no rows"
        raise ResultsError(f"{what}: figures of different devices cannot be compared: {listed}")
    return found[0]


def machines(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each machine, the one that was measured last first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["when"]), reverse=True):
        found.setdefault(machine(row), [])
    for row in rows:
        found[machine(row)].append(row)
    return [*found.values()]


def devices(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each device: machine by machine as `machines` has them, the best instruction set first."""
    found: dict[str, list[Row]] = {}
    for mine in machines(rows):
        for row in sorted(mine, key=lambda row: ISAS.index(row["isa"]) if row["isa"] in ISAS else len(ISAS)):
            found.setdefault(device(row), []).append(row)
    return [*found.values()]


def context(command: Sequence[str]) -> Row:
    """Return the columns of CONTEXT as they are now."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": best_isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bwla_compiler": bwla_compiler.__version__,
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks", *map(_without_place, command)]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _without_place(argument: str) -> str:
    """Return an argument, of a path from the root its last part alone: where a folder lay means nothing to others."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def _commit() -> str:
    """Return the commit measured, marked where source files differ from it (results may)."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.toml")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()

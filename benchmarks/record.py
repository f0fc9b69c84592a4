"""Results as JSON lines: each with the machine, versions, commit and command that it came from."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import bwla_compiler
from bwla_compiler.codegen.isa import best_isa
from bwla_compiler.inspector.machine import cpu_model

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def record(name: str, rows: list[Mapping[str, Any]]) -> Path:
    """Append rows to results/<name>.jsonl and return the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    context = _context()
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, **context}) + "\n")
    return path


def latest(path: Path, *, by: Sequence[str]) -> list[dict[str, Any]]:
    """Return of a file's rows the last one of each combination of these columns."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [*{tuple(row[column] for column in by): row for row in rows}.values()]


def _context() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": best_isa(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bwla_compiler": bwla_compiler.__version__,
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Return the commit measured, marked where files differ from it."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=True
        )
        return commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

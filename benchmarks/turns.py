"""The parent's side of contenders in processes of their own: started, asked in turn, ended."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.errors import ContenderError

ROOT = Path(__file__).parent.parent


class Contender:
    """A process that serves one way of one model; see `benchmarks.contender`."""

    def __init__(self, job: Mapping[str, Any], *, caches: Path) -> None:
        """job: what the process serves. caches: the folder of everything that it compiles."""
        environment = os.environ | {
            "BWLA_CACHE": str(caches / "bwla"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "OMP_NUM_THREADS": str(job["threads"]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contender", json.dumps(dict(job))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> "Contender":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, command: str) -> dict[str, Any]:
        """Return the answer to a command. Raises ContenderError where the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: what it said is read below
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the next answer; the first one comes unasked, when the model is loaded. Raises ContenderError."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise ContenderError(self._last_words())
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no message")
        return said if self._process.returncode >= 0 else f"ended by signal {-self._process.returncode}: {said}"

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

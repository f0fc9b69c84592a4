"""Compilation of emitted C++ to a shared library, cached on disk by everything that determines it."""

import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from bwla_compiler.codegen.isa import FLAGS, Isa, cpu_flags
from bwla_compiler.errors import BuildError
from bwla_compiler.settings import settings

log = logging.getLogger(__name__)

COMMON_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off")
"""No contraction: rounding to codes must equal torch's, bit for bit."""

TIMEOUT_SECONDS = 300.0


@functools.cache
def _version(command: tuple[str, ...]) -> str | None:
    """Return what the compiler says of its version, or None where it cannot be run."""
    if not command or shutil.which(command[0]) is None:
        return None
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout + answer.stderr if answer.returncode == 0 else None


def compiler_version() -> str | None:
    """Return the version text of the C++ compiler that the settings name, or None where there is none."""
    return _version(tuple(shlex.split(settings().compiler)))


def build(source: str, isa: Isa) -> Path | None:
    """Return the shared library compiled from `source` for `isa`; see `build_library`."""
    return build_library(source, isa, flags=(*COMMON_FLAGS, *FLAGS[isa]), key=sorted(cpu_flags()))


def build_library(
    source: str, name: str, *, flags: Sequence[str], links: Sequence[str] = (), key: Sequence[str] = ()
) -> Path | None:
    """Return the shared library compiled from `source`; from the cache where it was built before.

    name: first part of the file's name. flags, links: before and after the source on the command line. key: what
    else determines the result. None where no compiler is found (or BWLA_CXX is empty). Safe beside other processes: one
    compiles, to a temporary file that it renames, and the others wait for it. Raises BuildError with the compiler's
    words where the source does not compile, or where the cache folder cannot be written.
    """
    command = tuple(shlex.split(settings().compiler))
    version = _version(command)
    if version is None:
        return None
    parts = [source, *command, *flags, *links, version, *key]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    folder = settings().cache / "kernels"
    library = folder / f"{name}-{digest[:32]}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock")):
            if not library.exists():
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    _compile([*command, *flags], source, Path(work), library, links=links)
    except OSError as error:
        raise BuildError(f"cannot write kernels to {folder}: {error}; set BWLA_CACHE to a writable folder") from error
    return library


def _compile(command: list[str], source: str, work: Path, library: Path, *, links: Sequence[str]) -> None:
    """Compile in the folder `work`, then move the result to `library` in one step."""
    text, result = work / "kernels.cpp", work / "kernels.so"
    text.write_text(source)
    log.info("compiling kernels: %s", shlex.join(command))
    try:
        run = subprocess.run(
            [*command, str(text), "-o", str(result), *links], capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{shlex.join(command)} took more than {TIMEOUT_SECONDS:.0f} seconds") from error
    if run.returncode != 0:
        raise BuildError(f"{shlex.join(command)} failed with status {run.returncode}:\n{run.stderr.strip()}")
    os.replace(result, library)

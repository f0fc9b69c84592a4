"""The cache of built folders: sealed by a manifest of hashes, written aside and renamed, one builder at a time."""

import hashlib
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bwla_compiler.errors import DemoError

try:
    import fcntl
except ImportError:  # not on Windows: two processes may then build the same folder, and the first rename wins
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
Build = Callable[[Path], dict[str, Any]]


def ensure(folder: Path, build: Build) -> Path:
    """Return the folder, whole: as it is in the cache, or built anew where it is absent or damaged.

    build(empty folder) fills it and returns facts (JSON) for its manifest. A killed or failing build leaves
    nothing under the folder's name; a damaged folder is rebuilt with a warning. Parallel processes wait for the
    first. Raises DemoError where the cache cannot be written, and whatever build raises.
    """
    if damage(folder) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            found = damage(folder)  # again: another process may have built it meanwhile
            if found is not None:
                _rebuild(folder, build, found)
    except OSError as error:
        raise DemoError(f"{folder}: cannot be written ({error}); set BWLA_CACHE to a writable folder") from error
    return folder


def damage(folder: Path) -> str | None:
    """Return what is wrong with a cached folder ("absent", "x differs from its hash"), or None where it is whole."""
    if not folder.is_dir():
        return "absent"
    try:
        hashes = json.loads((folder / MANIFEST).read_text("utf-8"))["sha256"]
        for name, expected in hashes.items():
            if _sha256(folder / name) != expected:
                return f"{name} differs from its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def facts(folder: Path) -> dict[str, Any]:
    """Return what build said of a whole folder."""
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))["facts"]
    return found


def file_sha256(folder: Path, name: str) -> str:
    """Return the recorded hash of one file of a whole folder."""
    found: str = json.loads((folder / MANIFEST).read_text("utf-8"))["sha256"][name]
    return found


def _rebuild(folder: Path, build: Build, found: str) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp") if fcntl else ():  # the lock says nobody uses them
        shutil.rmtree(leftover, ignore_errors=True)
    if found != "absent":
        warnings.warn(f"{folder}: the cached embedded model is damaged ({found}); building it again", stacklevel=4)
        shutil.rmtree(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        _seal(temporary, build(temporary))
        temporary.chmod(0o755)  # mkdtemp's folders are private
        try:
            temporary.rename(folder)
        except OSError:
            if damage(folder) is not None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _seal(folder: Path, about: dict[str, Any]) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    manifest = {"facts": about, "sha256": {name: _sha256(folder / name) for name in names}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when a process dies, so no lock is ever stale."""
    if fcntl is None:
        yield
        return
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process is building it; waiting", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

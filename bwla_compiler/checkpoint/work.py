"""The folder of a run under way: finished shards and a manifest of their hashes; renamed when all is there.

OUT.partial holds what OUT will hold. The manifest is rewritten, whole, after each shard, so that what it names is on
the disk; a run that finds it goes on from there. OUT itself appears by one rename, with everything in it;
what only the run needed is removed from it then.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bwla_compiler.checkpoint.files import file_sha256, sync_folder, write_json, write_tensors, writing
from bwla_compiler.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows: there two runs on one folder are not told apart
    fcntl = None  # type: ignore[assignment]

MANIFEST = "progress.json"
VERSION = 1


class WorkFolder:
    """The work folder of one run into `out`; see the module's docstring.

    facts: what the run depends on, by the words that the user knows it by (recipe, calibration, ...), JSON data. A run
    that finds a folder of other facts is refused. Raises CheckpointError where out exists, or cannot be written, or
    another process is at it.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any]) -> None:
        check_out(out)
        out = out.resolve() if out.is_symlink() else out  # a folder is not renamed onto a link
        self.out, self.path = out, out.with_name(out.name + ".partial")
        self.facts: dict[str, Any] = json.loads(json.dumps(facts))
        self._lock: Any = None

    def __enter__(self) -> "WorkFolder":
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._lock.close()
                raise CheckpointError(f"{self.path}: another process is writing it; wait for its end") from error
        self.state = self._found() or {"version": VERSION, "facts": self.facts, "units": {}, "calibration": None}
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def _found(self) -> dict[str, Any] | None:
        """Return the manifest of an earlier run into the same folder, or None."""
        path = self.path / MANIFEST
        remedy = f"remove {self.path} to start anew"
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = json.loads(path.read_text("utf-8"))
            version, facts, _ = state["version"], state["facts"], state["units"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); {remedy}") from error
        if version != VERSION:
            raise CheckpointError(f"{path}: is of version {version}, not {VERSION}; {remedy}")
        changed = [key for key in sorted({*facts, *self.facts}) if facts.get(key) != self.facts.get(key)]
        if changed:
            raise CheckpointError(
                f"{self.path}: was begun with another {' and '.join(changed)}; start the same command as then, or "
                f"{remedy}"
            )
        return state

    def unit(self, name: str) -> dict[str, Any] | None:
        """Return the record of a finished unit, None where there is none.

        Raises CheckpointError where its shard is missing or differs from its hash.
        """
        record: dict[str, Any] | None = self.state["units"].get(name)
        if record is None:
            return None
        path = self.path / record["file"]
        if not path.is_file():
            raise CheckpointError(
                f"{path}: this shard of {name or 'embedding and head'} is missing; remove {self.path} to start anew"
            )
        if file_sha256(path) != record["sha256"]:
            raise CheckpointError(f"{path}: differs from its hash, it was damaged; remove {self.path} to start anew")
        return record

    def put(self, name: str, file: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a unit's shard, then the manifest that names it."""
        found = write_tensors(self.path / file, tensors)
        self.state["units"][name] = {"file": file, "sha256": found, **record}
        self.save()

    def write(self, file: str, tensors: Mapping[str, Tensor]) -> str:
        """Write a shard that is no unit's, so that a next run writes it anew; return its sha256."""
        return write_tensors(self.path / file, tensors)

    def save(self) -> None:
        """Write the manifest."""
        write_json(self.path / MANIFEST, self.state)

    def publish(self, keep: set[str]) -> None:
        """Give the folder its final name, and remove all but the files named.

        In this order: a run that is killed between has lost nothing, and its model can be used.
        """
        with writing(self.out):
            sync_folder(self.path)
            os.replace(self.path, self.out)
            sync_folder(self.out.parent)
            for path in sorted(self.out.iterdir()):
                if path.name not in keep or path.name == MANIFEST:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_out(out: Path) -> None:
    """Raise CheckpointError where a folder exists and is not empty, or can take no other's place."""
    with writing(out):
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken:
        raise CheckpointError(f"{out}: exists and is not an empty folder; give another one or remove it")
    if out.is_mount():
        raise CheckpointError(f"{out}: is a mount point, which cannot be renamed to; give a folder in it")

"""Emitted Triton source as an imported module: one file a source in the cache folder, named by its hash."""

import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from bwla_compiler.codegen.triton_spec import Emitted
from bwla_compiler.errors import BuildError
from bwla_compiler.settings import settings

REMEDY = "install it with: pip install 'triton>=3.6' (Linux)"


@functools.cache
def installed() -> bool:
    """Return whether Triton can be imported, without importing it."""
    if "triton" in sys.modules:
        return sys.modules["triton"] is not None  # None: its import is blocked
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether Triton runs kernels in its interpreter, on any device. Raises BuildError where it is missing."""
    return bool(require_triton().knobs.runtime.interpret)


def require_triton() -> Any:
    """Return the module triton. Raises BuildError, with the remedy, where it cannot be imported."""
    try:
        import triton
    except ImportError as error:
        raise BuildError(f"Triton cannot be imported ({error}); {REMEDY}") from error
    return triton


def digest(source: str) -> str:
    """Return the hash that names a source's file."""
    return hashlib.sha256(source.encode()).hexdigest()[:32]


def write(emitted: Emitted, folder: Path) -> Path:
    """Return the file that holds the source, written in one step where it is not there or not whole.

    Raises BuildError where the folder cannot be written.
    """
    path = folder / f"{emitted.name}_{digest(emitted.source)}.py"
    try:
        if path.is_file() and path.read_text("utf-8") == emitted.source:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(emitted.source)
        os.replace(draft, path)
    except OSError as error:
        raise BuildError(f"cannot write kernels to {folder}: {error}; set BWLA_CACHE to a writable folder") from error
    return path


def load(emitted: Emitted) -> Any:
    """Return the jit function of an emitted kernel. Raises BuildError without Triton, or without a writable cache."""
    if dump := settings().dump:
        write(emitted, dump)
    return getattr(_imported(str(write(emitted, settings().cache / "triton"))), emitted.name)


@functools.cache
def _imported(path: str) -> ModuleType:
    if interpreted():
        _mend_interpreter()
    name = f"bwla_triton_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as the import system does: Triton looks up a kernel's globals there
    spec.loader.exec_module(module)
    return module


@functools.cache
def _mend_interpreter() -> None:
    """Have the interpreter of Triton 3.6 read scalars as numbers under numpy 2.4 and newer, as its successors do.

    It keeps a scalar as an array of one entry, which numpy no longer converts (triton-lang/triton#9171).
    """
    from triton.runtime import interpreter

    patch: Callable[[Any, Any], None] = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)  # the scope knows what was there before, and puts it back
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = mended

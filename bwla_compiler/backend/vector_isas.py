"""Which vector instructions Inductor's C++ kernels may use, remembered from one process to the next.

Inductor compiles a trial for each, keeps it, and loads it in a process of its own each time that it is asked: two
seconds of a warm start. What it found once holds as long as torch, the compiler and the processor are the same.
"""

import hashlib
import json
import logging
from pathlib import Path

import torch

from bwla_compiler.backend.disk import write_whole
from bwla_compiler.codegen.build import compiler_version
from bwla_compiler.codegen.isa import cpu_flags
from bwla_compiler.settings import settings

log = logging.getLogger(__name__)


def recall_isas() -> None:
    """Have Inductor take what it found in an earlier process, where that is known and it has not looked yet."""
    from torch._inductor import config, cpu_vec_isa  # imports Inductor

    path = _path()
    if path is None or _found() is not None or (known := _known(path)) is None:
        return
    with config.patch({"cpp.vec_isa_ok": True}):  # without a trial: all that the processor has
        cpu_vec_isa.valid_vec_isa_list()
    if _found() != known:
        cpu_vec_isa.valid_vec_isa_list.cache_clear()


def remember_isas() -> None:
    """Write down what Inductor found, if it has looked in this process."""
    path, found = _path(), _found()
    if path is not None and found is not None and _known(path) != found:
        write_whole(path, lambda part: Path(part).write_text(json.dumps(found), "utf-8"), what="vector instructions")


def _found() -> list[str] | None:
    """Return the names of the instruction sets that Inductor found in this process, None before it has looked."""
    from torch._inductor import cpu_vec_isa

    looked = cpu_vec_isa.valid_vec_isa_list.cache_info().currsize
    return [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()] if looked else None


def _known(path: Path) -> list[str] | None:
    """Return what the file says, None where there is none; a damaged one is removed."""
    if not path.is_file():
        return None
    try:
        known: list[str] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        log.warning("%s is damaged and is made anew: %s", path, error)
        path.unlink(missing_ok=True)
        return None
    return known


def _path() -> Path | None:
    """Return the file of this machine; None without a compiler, or where the user told Inductor what it has."""
    from torch._inductor import config

    version = compiler_version()
    if version is None or config.cpp.vec_isa_ok is not None:
        return None
    parts = [torch.__version__, version, str(config.cpp.cxx), *sorted(cpu_flags())]
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=20).hexdigest()
    return settings().cache / "inductor" / f"{digest}.json"

"""The one place that reads the environment: variables named BWLA_*."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    cache: folder of compiled kernels, embedded models and cached packs (BWLA_CACHE).
    debug: log a line per node (BWLA_DEBUG). dump: folder that receives graphs and sources (BWLA_DUMP).
    verify: check every compiled region against its reference (BWLA_VERIFY).
    compiler: the C++ compiler (BWLA_CXX, else CXX, else g++); an empty string means "none".
    """

    cache: Path
    debug: bool
    dump: Path | None
    verify: bool
    compiler: str


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no")


def settings() -> Settings:
    """Return the settings as the environment has them now (read anew at every call)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    dump = os.environ.get("BWLA_DUMP")
    return Settings(
        cache=Path(os.environ.get("BWLA_CACHE") or home / "bwla-compiler"),
        debug=_flag("BWLA_DEBUG"),
        dump=Path(dump) if dump else None,
        verify=_flag("BWLA_VERIFY"),
        compiler=os.environ.get("BWLA_CXX", os.environ.get("CXX", "g++")),
    )

"""The one place that reads the environment: variables named BWLA_*."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from bwla_compiler.errors import SettingsError

Kernels = Literal["auto", "triton", "cpp", "torch"]
"""Who computes: Triton on GPUs and C++ on the CPU; Triton everywhere; C++ on the CPU alone; plain torch."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    cache: folder of compiled kernels, embedded models and cached packs (BWLA_CACHE).
    debug: log a line per node (BWLA_DEBUG). dump: folder that receives graphs and sources (BWLA_DUMP).
    verify: check every compiled region against its reference (BWLA_VERIFY).
    compiler: the C++ compiler (BWLA_CXX, else CXX, else g++); an empty string means "none".
    kernels: who computes (BWLA_KERNELS). tune: time tiles of GPU kernels when they are first met (BWLA_TUNE, on).
    inline: put GPU kernels into compiled graphs, where Inductor sees them (BWLA_INLINE, on); else operators stay calls.
    """

    cache: Path
    debug: bool
    dump: Path | None
    verify: bool
    compiler: str
    kernels: Kernels
    tune: bool = True
    inline: bool = True


def _flag(name: str, default: str = "") -> bool:
    return os.environ.get(name, default).lower() not in ("", "0", "false", "no")


def chosen_kernels() -> Kernels:
    """Return who computes, as BWLA_KERNELS has it now; "auto" where it is not set.

    Raises SettingsError for a value that is not known. Far cheaper than all settings: operators ask at every call.
    """
    found = os.environ.get("BWLA_KERNELS") or "auto"
    if found not in get_args(Kernels):
        raise SettingsError(f"BWLA_KERNELS is {found!r}: expected one of {', '.join(get_args(Kernels))}, or unset it")
    return cast(Kernels, found)


def settings() -> Settings:
    """Return the settings as the environment has them now (read anew at every call).

    Raises SettingsError for a value that is not known.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    dump = os.environ.get("BWLA_DUMP")
    return Settings(
        cache=Path(os.environ.get("BWLA_CACHE") or home / "bwla-compiler"),
        debug=_flag("BWLA_DEBUG"),
        dump=Path(dump) if dump else None,
        verify=_flag("BWLA_VERIFY"),
        compiler=os.environ.get("BWLA_CXX", os.environ.get("CXX", "g++")),
        kernels=chosen_kernels(),
        tune=_flag("BWLA_TUNE", "1"),
        inline=_flag("BWLA_INLINE", "1"),
    )

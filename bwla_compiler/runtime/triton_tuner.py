"""Which tile a kernel gets: timed on the GPU among the model's best few, kept in a table; else the model's first."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bwla_compiler.codegen import triton_module
from bwla_compiler.codegen.triton_spec import NO_TILE, LinearKernel, Tile
from bwla_compiler.codegen.triton_tiles import device_for, ranked, tokens_bucket
from bwla_compiler.cost.devices import Device
from bwla_compiler.settings import settings

log = logging.getLogger(__name__)

TIMED = 3
"""Tiles that are timed, of the modelled order."""


@dataclass(frozen=True)
class Choice:
    """A tile, how it was chosen, and its seconds where they were measured."""

    tile: Tile
    how: Literal["timed", "modelled"]
    seconds: float | None = None


_CHOSEN: dict[str, Choice] = {}


def choices() -> dict[str, Choice]:
    """Return the tiles of this process by device, kernel and number of tokens."""
    return dict(_CHOSEN)


def forget_choices() -> None:
    """Drop this process's tiles; the table on the disk stays."""
    _CHOSEN.clear()
    _table.cache_clear()


def tile_for(spec: LinearKernel, tokens: int, x: Tensor, run: Callable[[Tile], None]) -> Tile:
    """Return the tile of a kernel for so many tokens on x's device.

    spec: its tile is not looked at. run: launches the kernel with a tile; called where tiles can be timed.
    """
    device_name = _device_name(x)
    base = dataclasses.replace(spec, tile=NO_TILE)
    key = _key(device_name, base, tokens_bucket(tokens))
    found = _CHOSEN.get(key)
    if found is None or (found.how == "modelled" and _can_time(x)):
        found = _table().get(key) or _choose(spec, tokens, x, device_name, run)
        _CHOSEN[key] = found
        if found.how == "timed" and key not in _table():
            _keep(key, found)
    return found.tile


def _choose(spec: LinearKernel, tokens: int, x: Tensor, name: str, run: Callable[[Tile], None]) -> Choice:
    tiles = ranked(spec, tokens, device_for([name]), smallest=smallest_product(x))
    if not _can_time(x):
        return Choice(tiles[0], "modelled")
    seconds = {tile: seconds_of(functools.partial(run, tile)) for tile in tiles[:TIMED]}
    best = min(seconds, key=seconds.__getitem__)
    log.info("%s, %d tokens: %s, %.1f us, of %d tiles", spec.out_features, tokens, best, 1e6 * seconds[best], TIMED)
    return Choice(best, "timed", seconds[best])


def smallest_product(x: Tensor) -> int:
    """Return the tokens of the narrowest product of x's device."""
    return 16 if x.is_cuda and torch.version.hip is not None else 8


def seconds_of(run: Callable[[], object]) -> float:
    """Return the median seconds of a launch with cold caches; infinite where the device has not the resources."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(run, warmup=5, rep=20, return_mode="median")) / 1e3
    except OutOfResources:
        return float("inf")


def _can_time(x: Tensor) -> bool:
    """Whether kernels can be timed now: on a GPU, outside tracing and the recording of a CUDA graph."""
    if not x.is_cuda or type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        return False
    return settings().tune and not torch.cuda.is_current_stream_capturing()


def _device_name(x: Tensor) -> str:
    """Return the name of x's device; of the interpreter, and where no GPU is there, that of an H100 in words."""
    if x.is_cuda and torch.cuda.is_available():
        return _cuda_name(x.device.index or 0)
    return "h100-sxm, modelled"


@functools.cache
def _cuda_name(index: int) -> str:
    return str(torch.cuda.get_device_name(index))


def device_of(x: Tensor) -> Device:
    """Return the device of the cost model that is nearest to x's."""
    return device_for([_device_name(x)])


@functools.cache
def _key(device: str, spec: LinearKernel, tokens: int) -> str:
    fields = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(spec).items() if k != "tile")
    return f"{device} | triton {triton_module.require_triton().__version__} | {tokens} tokens | {fields}"


# ---------------------------------------------------------------- the table on the disk


def _path() -> Path:
    return settings().cache / "triton" / "tiles.json"


@functools.cache
def _table() -> dict[str, Choice]:
    """Return the timed tiles of earlier processes; none where the table is not there or not readable."""
    try:
        saved = json.loads(_path().read_text("utf-8"))
        return {key: Choice(Tile(**entry["tile"]), "timed", entry["seconds"]) for key, entry in saved.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s is not readable (%s): tiles are chosen anew", _path(), error)
        return {}


def table_text() -> str:
    """Return the table as it stands on the disk, empty where there is none: what is compiled with its tiles."""
    try:
        return _path().read_text("utf-8")
    except (OSError, ValueError):
        return ""


def _keep(key: str, choice: Choice) -> None:
    """Add a tile to the table, with what other processes have added; a folder that is not writable is no error."""
    _table.cache_clear()
    entries = {**_table(), key: choice}
    text = json.dumps({k: {"tile": dataclasses.asdict(c.tile), "seconds": c.seconds} for k, c in entries.items()})
    with contextlib.suppress(OSError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=_path().parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, _path())
    _table.cache_clear()

"""What this machine has, and what follows for the compiler."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from bwla_compiler.codegen.build import build, compiler_version
from bwla_compiler.codegen.isa import best_isa
from bwla_compiler.errors import BuildError
from bwla_compiler.inspector.table import Cell, Table, row, size
from bwla_compiler.settings import settings

NEEDED = {"torch": (2, 11), "transformers": (5, 17), "triton": (3, 6)}
"""Least versions of the packages that decide what works."""

SLOW = "kernels run on the portable path: correct, much slower"
PROBE = 'extern "C" int bwla_probe() { return 7; }\n'


def machine_table() -> Table:
    """Return one row a fact: what it is, what was found, and what follows from it."""
    python = row("Python", platform.python_version(), _verdict(sys.version_info >= (3, 11), "fine", "3.11 is needed"))
    rows = [python, *(_package(name) for name in NEEDED), _processor(), _compiler(), _gpu(), _cache()]
    return Table("", ("what", "found", "what follows"), tuple(rows))


def _verdict(good: bool, yes: str, no: str) -> Cell:
    return Cell(yes, "folded") if good else Cell(no, "partial")


def _package(name: str) -> tuple[Cell, ...]:
    least = ".".join(map(str, NEEDED[name]))
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        missing = "no GPU kernels" if name == "triton" else f"nothing works: pip install '{name}>={least}'"
        return row(name, "not installed", Cell(missing, "partial"))
    good = tuple(int(part) for part in found.split("+")[0].split(".")[:2]) >= NEEDED[name]
    return row(name, found, _verdict(good, "fine", f"older than {least}, which this version is tested with"))


def _processor() -> tuple[Cell, ...]:
    isa = best_isa()
    found = f"{cpu_model()}, {os.cpu_count()} cores, {isa}"
    return row("processor", found, _verdict(isa != "portable", f"kernels are emitted for {isa}", SLOW))


def cpu_model() -> str:
    """Return the processor's name, with its family and model where a virtual machine hides which one it is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    first: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        first.setdefault(key.strip(), value.strip())
    name = first.get("model name", platform.machine())
    if any(c.isdigit() for c in name) or not {"cpu family", "model"} <= first.keys():
        return name
    return f"{name} (family {first['cpu family']}, model {first['model']})"


def _compiler() -> tuple[Cell, ...]:
    version = compiler_version()
    if version is None:
        name = settings().compiler or "none is set"
        return row("C++ compiler", f"{name}: not found", Cell(f"{SLOW}; install g++ or set BWLA_CXX", "partial"))
    try:
        build(PROBE, best_isa())
    except BuildError as error:
        words = str(error).splitlines()[0]
        return row("C++ compiler", version.splitlines()[0], Cell(f"it does not work ({words}): {SLOW}", "partial"))
    return row("C++ compiler", version.splitlines()[0], Cell("kernels are compiled once and cached", "folded"))


def _gpu() -> tuple[Cell, ...]:
    try:
        import torch
    except ImportError:
        return row("GPU", "torch is not installed", Cell("nothing works without it", "partial"))
    if not torch.cuda.is_available():
        return row("GPU", "none that torch sees", Cell("everything runs on the processor", "quiet"))
    properties = torch.cuda.get_device_properties(0)
    found = f"{properties.name}, {size(properties.total_memory)}"
    return row(
        "GPU", found, Cell("no GPU kernels in this version: packed linears run on plain torch operations", "partial")
    )


def _cache() -> tuple[Cell, ...]:
    folder = settings().cache
    n_bytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
    writable = os.access(next(p for p in (folder, *folder.parents) if p.exists()), os.W_OK)
    follows = _verdict(writable, "safe to delete: it is made again when needed", "not writable: set BWLA_CACHE")
    return row("cache", f"{folder}, {size(n_bytes)}", follows)

"""Seconds to the first result of a compiled model, in a process of its own: cold caches, then warm ones."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = ("inductor fp32", "bwla, packed model", "bwla, raw model")
Progress = Callable[[str, int, int], None]


def measure(progress: Progress) -> list[dict[str, Any]]:
    """Return a row per way: seconds of the first call, cold and warm, and of importing and loading before it.

    The embedded model, one sequence of 64 tokens. Cold: no kernel, no packed weights, no Inductor cache on disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _save_models(root)
        rows = []
        for i, way in enumerate(WAYS):
            caches = root / f"caches{i}"
            row: dict[str, Any] = {"way": way}
            for j, state in enumerate(("cold", "warm")):
                progress(f"compile time: {way}, {state}", 2 * i + j, 2 * len(WAYS))
                row |= {f"{what}_{state}_seconds": s for what, s in _in_process(way, root, caches).items()}
            rows.append(row)
    progress("compile time", 2 * len(WAYS), 2 * len(WAYS))
    return rows


def _save_models(root: Path) -> None:
    import bwla_compiler as bwla

    model = bwla.load("demo:").model
    bwla.save(model, root / "float")
    bwla.quantize(model, recipe="hadamard-rtn", calibration="none")
    bwla.save(model, root / "packed")


def _in_process(way: str, root: Path, caches: Path) -> dict[str, float]:
    environment = os.environ | {
        "BWLA_CACHE": str(caches / "bwla"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    model = root / ("packed" if way == "bwla, packed model" else "float")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_time", way, str(model)],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr.strip().splitlines()[-1] if done.stderr else 'no message'}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _first_call(way: str, folder: str) -> dict[str, float]:
    """Return the seconds of this process until its first result."""
    start = time.perf_counter()
    import torch

    import bwla_compiler as bwla

    model = bwla.load(folder).model
    loaded = time.perf_counter()
    compiled = torch.compile(model, backend="inductor" if way == "inductor fp32" else "bwla")
    with torch.no_grad():
        compiled(torch.arange(64)[None])
    return {"load": loaded - start, "first_call": time.perf_counter() - loaded}


if __name__ == "__main__":
    print(json.dumps(_first_call(sys.argv[1], sys.argv[2])))

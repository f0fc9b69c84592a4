"""Seconds and memory of quantizing a folder block by block: random weights of any config, in a process of its own.

Memory is anonymous memory (RssAnon), sampled: pages of mapped files are the system's to drop, and are not counted.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from bwla_compiler.checkpoint.files import write_json, write_tensors
from bwla_compiler.graph.planner import block_of

Progress = Callable[[str, int, int], None]

_QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3-1024": lambda: Qwen3Config(
        **_QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_hidden_layers=36,
        tie_word_embeddings=False,
    ),
    "qwen3-8b": lambda: Qwen3Config(
        **_QWEN3,
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_hidden_layers=36,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    ),
}
POOL = 1 << 24
"""Normal numbers that all weights are cut from, each from a place of its own."""

SAMPLING_SECONDS = 0.005
STAGES = ("planning", "blocks", "ends")
MIB = 1 << 20


def measure(
    progress: Progress, *, config: str, layers: Sequence[int], recipe: str, folder: Path | None = None
) -> list[dict[str, Any]]:
    """Return a row for each number of layers; without one, for the config's own.

    config: a name of CONFIGS or a config.json. folder: where there is disk space for the model and its packed form.
    """
    rows = []
    for number in layers or [0]:
        wanted = CONFIGS[config]() if config in CONFIGS else AutoConfig.from_pretrained(config)
        if number:
            wanted.num_hidden_layers = number
            wanted.layer_types = None if wanted.layer_types is None else wanted.layer_types[:1] * number
        with tempfile.TemporaryDirectory(dir=folder) as place:
            write_random(wanted, Path(place) / "float", progress=progress)
            progress(f"quantizing {wanted.num_hidden_layers} layers", 0, 1)
            rows.append({"config": config, "layers": wanted.num_hidden_layers, **_in_process(Path(place), recipe)})
    return rows


def write_random(config: Any, folder: Path, *, seed: int = 0, progress: Progress) -> None:
    """Write a bfloat16 model of normal weights, a shard a block, so that no more than a shard is in memory."""
    generator = torch.Generator().manual_seed(seed)
    pool = (torch.randn(POOL, generator=generator) * config.initializer_range).bfloat16()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        shards.setdefault(block_of(name), {})[name] = parameter.shape
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    for i, shapes in enumerate(shards.values()):
        progress("writing random weights", i, len(shards))
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: _drawn(shape, pool, generator) for name, shape in shapes.items()})
        index |= dict.fromkeys(shapes, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(folder)


def _drawn(shape: torch.Size, pool: Tensor, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=pool.dtype)
    start = int(torch.randint(POOL, (1,), generator=generator))
    times = -(-(start + shape.numel()) // POOL)
    return pool.repeat(times)[start : start + shape.numel()].reshape(shape)


def _in_process(place: Path, recipe: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.quantize_memory", str(place / "float"), str(place / "out"), recipe]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else "no message")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


class Peaks:
    """The most anonymous memory of this process in each stage, in bytes, sampled by a thread while it is entered."""

    def __init__(self) -> None:
        self.stage = STAGES[0]
        self.found = dict.fromkeys(STAGES, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Peaks":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLING_SECONDS):
            self.found[self.stage] = max(self.found[self.stage], anonymous_bytes())


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process that is resident, in bytes; Linux alone tells."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no RssAnon")


def _quantize(source: str, out: str, recipe: str) -> dict[str, Any]:
    """Quantize here, and return seconds and memory."""
    from bwla_compiler import api

    start, cpu = time.perf_counter(), time.process_time()
    seconds: list[float] = []
    with Peaks() as peaks:

        def told(label: str, done: int, total: int) -> None:
            if label == "quantizing":
                peaks.stage = STAGES[1 + (done == total)]

        base = anonymous_bytes()
        api.quantize_to(source, out, recipe=recipe, progress=told, on_block=lambda b: seconds.append(b.seconds))
    return {
        "recipe": recipe,
        "threads": torch.get_num_threads(),
        "block_seconds": statistics.median(seconds),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "base_mib": base / MIB,
        **{f"{stage}_mib": n / MIB for stage, n in peaks.found.items()},
        "peak_mib": max(peaks.found.values()) / MIB,
        "read_mib": _folder_bytes(Path(source)) / MIB,
        "written_mib": _folder_bytes(Path(out)) / MIB,
    }


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


if __name__ == "__main__":
    print(json.dumps(_quantize(*sys.argv[1:])))

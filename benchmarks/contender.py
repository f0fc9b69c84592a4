"""One way to run one model, in a process of its own: loads, compiles, and answers commands, a JSON line each.

A process of its own makes peak memory, caches and the settings that a peer changes its own alone; the parent
(`benchmarks.turns`) lets one contender at a time compute.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from benchmarks.llama import LlamaRunner
from benchmarks.memory import PeakMemory
from benchmarks.noise import pinned
from benchmarks.peers import LLAMA, Way, named
from benchmarks.runner import Runner
from bwla_compiler import api
from bwla_compiler.backend import compile_backend

MEMORY_SECONDS = 0.05
"""From sample to sample of memory: a thousandth of the time that is measured."""


class TorchRunner(Runner):
    """A model of transformers loaded one way."""

    def __init__(self, way: Way, folder: str, ids: Tensor, *, prompt: int) -> None:
        super().__init__(ids, prompt=prompt)
        start = time.perf_counter()
        self.model = _loaded(way, folder)
        cache = StaticCache(config=self.model.config, max_cache_len=ids.shape[1])
        self.cache = api.int8_cache(cache) if way.int8_cache else cache
        self.call, self.freeze = _compiled(way, self.model), way.freeze
        self.load_seconds = time.perf_counter() - start
        self.n_bytes, self.about = model_bytes(self.model), way.version()

    @torch.no_grad()
    def first(self) -> dict[str, float]:
        """Return the seconds of the first prefill and of the first decoded token, compiling included."""
        # The cache's tensors are made outside the compiled region, by a token that is then forgotten.
        self.model(input_ids=self.ids[:, :1], past_key_values=self.cache, use_cache=True)
        with torch._inductor.config.patch(freezing=self.freeze):
            return super().first()

    def prefill(self) -> Tensor:
        """Return the logits of the prompt, read into an empty cache."""
        self.cache.reset()
        return self._logits(self.ids[:, : self.prompt])

    def step(self, i: int) -> Tensor:
        """Return the logits of the i-th token after the prompt; its cache grows by it."""
        return self._logits(self.ids[:, self.prompt + i : self.prompt + i + 1])

    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.call(input_ids=ids, past_key_values=self.cache, use_cache=True).logits
        return logits


def runner_of(way: Way, path: str, ids: Tensor, *, prompt: int, threads: int) -> Runner:
    """Return what runs a way of the model at a path: a folder, or for llama.cpp a GGUF file."""
    if way.compiler == LLAMA:
        return LlamaRunner(Path(path), ids, prompt=prompt, threads=threads)
    return TorchRunner(way, path, ids, prompt=prompt)


def _loaded(way: Way, folder: str) -> Any:
    model = api.load(folder, dtype=way.dtype).model
    if way.quantize is not None:
        way.quantize(model)
    return model


def _compiled(way: Way, model: nn.Module) -> Callable[..., Any]:
    if way.compiler == "eager":
        return model
    if way.compiler == "bwla":
        return torch.compile(model, backend=compile_backend, dynamic=False)
    return torch.compile(model, dynamic=False, mode=way.options or None)


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones once, those inside tensor subclasses too."""
    stored: dict[int, int] = {}
    waiting: list[Any] = [*model.parameters(), *model.buffers()]
    while waiting:
        tensor = waiting.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            waiting += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        elif tensor.numel():
            storage = tensor.untyped_storage()
            stored[storage.data_ptr()] = storage.nbytes()
    return sum(stored.values())


def serve(job: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    """Load the job's way, then answer the commands of the standard input until it ends."""
    way = named(job["way"])
    with PeakMemory(mapped=True, seconds=MEMORY_SECONDS) as memory:  # weights that are computed with may be mapped
        _serve(job, way, memory, answer)


def _serve(job: dict[str, Any], way: Way, memory: PeakMemory, answer: Callable[[dict[str, Any]], None]) -> None:
    before = memory.fields()["peak_mib"]
    runner = runner_of(way, job["path"], torch.load(job["ids"]), prompt=job["prompt"], threads=job["threads"])
    loaded = {"load_seconds": runner.load_seconds, "n_bytes": runner.n_bytes, "before_mib": before}
    answer({**loaded, "version": runner.about})
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "first":
            answer(runner.first())
        elif command == "logits":
            torch.save(runner.logits(), argument)
            memory.forget()
            answer({})
        elif command == "round":
            answer(runner.round())
        elif command == "memory":
            answer(memory.fields())
        else:
            raise ValueError(f"no command is called {command!r}")


def main(text: str) -> None:
    """Serve the job that this JSON says. Answers go to the standard output, whatever libraries print to the errors."""
    job = json.loads(text)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with pinned(job["threads"]):
        serve(job, lambda fields: print(json.dumps(fields), file=out))


if __name__ == "__main__":
    main(sys.argv[1])

"""llama.cpp's whole models, by the low-level interface of llama-cpp-python: token ids in, logits out.

As its own programs run it: weights in the layouts that it repacks them to, flash attention and a float16 cache where it
chooses them. The file is read, not mapped, so that no page of it is fetched while something is timed.
"""

import ctypes
import importlib
import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import tiles
from benchmarks.errors import ContenderError
from benchmarks.runner import Runner

PACKAGE = "llama-cpp-python"
_ERROR = 4
"""GGML_LOG_LEVEL_ERROR."""

_said: list[str] = []
_heard: list[Any] = []
"""What llama.cpp calls must outlive its models."""


class Llama:
    """A GGUF model with a cache of `length` tokens."""

    def __init__(self, file: Path, *, length: int, threads: int) -> None:
        """Load it. Raises ContenderError, with llama.cpp's words, where it cannot."""
        self._api: Any = importlib.import_module("llama_cpp")
        self._api.llama_log_set(_log(self._api), ctypes.c_void_p(0))
        self._api.llama_backend_init()
        _said.clear()
        self._model = self._loaded(file)
        self._context = self._started(length, threads)
        self.n_bytes = file.stat().st_size
        self.vocabulary = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        self._memory = self._api.llama_get_memory(self._context)
        self._batches: dict[int, Any] = {}

    def _loaded(self, file: Path) -> Any:
        parameters = self._api.llama_model_default_params()
        parameters.load_mode, parameters.n_gpu_layers = self._api.LLAMA_LOAD_MODE_NONE, 0
        model = self._api.llama_model_load_from_file(str(file).encode(), parameters)
        if not model:
            said = " ".join(_said).replace(str(file), file.name)
            raise ContenderError(f"llama.cpp cannot load {file.name}: {said or 'it says nothing'}")
        return model

    def _started(self, length: int, threads: int) -> Any:
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = length
        parameters.n_threads = parameters.n_threads_batch = threads
        context = self._api.llama_init_from_model(self._model, parameters)
        if not context:
            raise ContenderError(f"llama.cpp cannot begin: {' '.join(_said) or 'it says nothing'}")
        return context

    @property
    def about(self) -> str:
        """Its version and what this build uses of the machine."""
        said = self._api.llama_print_system_info().decode()
        parts = [part.rpartition(":")[2].split("=") for part in said.split("|") if "=" in part]
        used = " ".join(name.strip() for name, on in parts if on.strip() != "0")
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)} ({used})"

    def forget(self) -> None:
        """Begin a new text."""
        self._api.llama_memory_clear(self._memory, False)

    def decode(self, ids: Sequence[int], *, position: int) -> Tensor:
        """Return logits [len(ids), vocabulary] float32 of tokens that stand at `position` and after; lent until the
        next call. Raises ContenderError where llama.cpp fails.
        """
        batch = self._batches.get(len(ids)) or self._new_batch(len(ids))
        for i, number in enumerate(ids):
            batch.token[i], batch.pos[i] = number, position + i
        tiles.GGML.restore()
        code = self._api.llama_decode(self._context, batch)
        tiles.GGML.keep()
        if code:
            raise ContenderError(f"llama_decode fails with {code}: {' '.join(_said[-2:])}")
        values = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (len(ids), self.vocabulary))
        return torch.from_numpy(values)

    def _new_batch(self, n_tokens: int) -> Any:
        """Return a batch that asks for the logits of each of its tokens, as all contenders compute them."""
        batch = self._api.llama_batch_init(n_tokens, 0, 1)
        batch.n_tokens = n_tokens
        for i in range(n_tokens):
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
        self._batches[n_tokens] = batch
        return batch

    def close(self) -> None:
        """Give its memory back."""
        for batch in self._batches.values():
            self._api.llama_batch_free(batch)
        self._batches.clear()
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)


def _log(api: Any) -> Any:
    """Return the function that hears llama.cpp's log and keeps what it says of errors."""

    def hear(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            _said.append(text.decode("utf-8", "replace").strip())

    _heard.append(api.llama_log_callback(hear))
    return _heard[-1]


class LlamaRunner(Runner):
    """A GGUF file as a contender."""

    def __init__(self, file: Path, ids: Tensor, *, prompt: int, threads: int) -> None:
        super().__init__(ids, prompt=prompt)
        start = time.perf_counter()
        self.llama = Llama(file, length=ids.shape[1], threads=threads)
        self.load_seconds = time.perf_counter() - start
        self.n_bytes, self.about = self.llama.n_bytes, self.llama.about
        self._ids: list[int] = ids[0].tolist()

    def prefill(self) -> Tensor:
        """Return the logits of the prompt; see Runner."""
        self.llama.forget()
        return self.llama.decode(self._ids[: self.prompt], position=0)[None]

    def step(self, i: int) -> Tensor:
        """Return the logits of the i-th token after the prompt; see Runner."""
        at = self.prompt + i
        return self.llama.decode(self._ids[at : at + 1], position=at)[None]


class LlamaModule(nn.Module):
    """A loaded GGUF model as a causal LM of ids [n, length], so that what measures ours measures it too."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama = llama
        self.config = SimpleNamespace(vocab_size=llama.vocabulary)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Return `.logits` [n, length, vocabulary] float32, each row a text of its own."""
        rows = []
        for ids in input_ids.tolist():
            self.llama.forget()
            rows.append(self.llama.decode(ids, position=0).clone())
        return SimpleNamespace(logits=torch.stack(rows))

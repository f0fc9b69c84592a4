"""Values derived from tensors (kernel layouts, decoded scales), kept while the tensor lives and is not edited.

What is edited is told by `runtime.seen`. An inference tensor has no count of its edits, so nothing is kept for it;
`x.data.mul_()` cannot be seen: call `native.forget` after such an edit.
"""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from bwla_compiler.errors import BwlaError
from bwla_compiler.runtime.seen import Seen

V = TypeVar("V")


@dataclass(frozen=True)
class _Entry(Generic[V]):
    """A value, and the tensor (and the one beside it) that it was derived from. owner: tells when the first dies."""

    owner: "weakref.ref[Tensor]"
    seen: tuple[Seen, ...]
    value: V

    def holds(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether these are the tensors that the value was derived from, unedited."""
        return len(tensors) == len(self.seen) and all(map(Seen.holds, self.seen, tensors))


def _recording(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded on the tensor's device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Derived(Generic[V]):
    """A cache of one derived value per tensor. name: what it holds, for the warning."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._entries: dict[int, _Entry[V]] = {}
        self.forgotten = 0
        """How often `forget` was called: what holds derived values elsewhere looks at it."""

    def get(self, tensor: Tensor, make: Callable[[], V], *, beside: Tensor | None = None) -> V:
        """Return make() for this state of `tensor`, called once a state.

        beside: a second tensor (an exponent) that the value depends on. Raises BwlaError where that would have to be
        derived while a CUDA graph is recorded: it would live in the graph's memory.
        """
        sources = (tensor,) if beside is None else (tensor, beside)
        if any(source.is_inference() for source in sources):
            self._warn_inference()
            return make()
        key = id(tensor)
        entry = self._entries.get(key)
        if entry is not None and entry.holds(sources):
            return entry.value
        if _recording(tensor):
            raise BwlaError(
                f"a weight's {self._name} is asked for while a CUDA graph is recorded, and was not derived before: "
                "call the model once outside the recording, after the last edit of its weights"
            )
        seen = tuple(map(Seen, sources))  # before: an edit while the value is made is one to be seen
        value = make()
        self._entries[key] = _Entry(weakref.ref(tensor, lambda ref: self._drop(key, ref)), seen, value)
        return value

    def forget(self, tensor: Tensor) -> None:
        """Drop what was derived from this tensor."""
        self._entries.pop(id(tensor), None)
        self.forgotten += 1

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, key: int, ref: "weakref.ref[Tensor]") -> None:
        """Remove the entry of a dead tensor, unless a new tensor took its id."""
        entry = self._entries.get(key)
        if entry is not None and entry.owner is ref:
            del self._entries[key]

    def _warn_inference(self) -> None:
        warnings.warn(
            f"weights made under torch.inference_mode() have no version, so their {self._name} is derived anew at "
            "every call; make or load the model outside inference mode",
            RuntimeWarning,
            stacklevel=2,
        )

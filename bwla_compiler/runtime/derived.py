"""Values derived from tensors (kernel layouts, decoded scales), kept while the tensor lives and is not edited.

Keyed by a weak reference, the storage, the address and the version of the tensor: an id or an address alone may be
recycled (hence weak references to storages too), an edit in place moves only the version. An inference tensor has no
version, so nothing is kept for it. `x.data.mul_()` moves none of them and cannot be seen: call `native.forget` after
such an edit.
"""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bwla_compiler.errors import BwlaError

V = TypeVar("V")


@dataclass(frozen=True)
class _Entry(Generic[V]):
    """A value, and the state of the tensor (and of the one beside it) that it was derived from."""

    owner: "weakref.ref[Tensor]"
    state: tuple[Any, ...]
    storages: tuple[StorageWeakRef, ...]
    value: V


def _state(tensor: Tensor, beside: Tensor | None) -> tuple[Any, ...]:
    """Return what changes whenever the tensor, or the one beside it, is replaced, moved or edited in place."""
    own = (tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor._version, tensor.shape)
    if beside is None:
        return own
    return (*own, id(beside), beside.untyped_storage()._cdata, beside.data_ptr(), beside._version)


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
        if tensor.is_inference() or (beside is not None and beside.is_inference()):
            self._warn_inference()
            return make()
        key, state = id(tensor), _state(tensor, beside)
        entry = self._entries.get(key)
        if entry is not None and entry.owner() is tensor and entry.state == state:
            return entry.value
        if _recording(tensor):
            raise BwlaError(
                f"a weight's {self._name} is asked for while a CUDA graph is recorded, and was not derived before: "
                "call the model once outside the recording, after the last edit of its weights"
            )
        value = make()
        storages = tuple(StorageWeakRef(t.untyped_storage()) for t in (tensor, beside) if t is not None)
        self._entries[key] = _Entry(weakref.ref(tensor, lambda ref: self._drop(key, ref)), state, storages, value)
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

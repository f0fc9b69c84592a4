"""Seen: what a tensor was when something was made of it, and whether it still is."""

import weakref
from collections.abc import Callable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Seen:
    """A tensor as it was at one moment: which one, where it lay, and how often it had been edited.

    An id and an address are taken again by others, so what they belong to is kept known: the storage by a weak
    reference, after which the memory may go and no other storage takes its place; the tensor by a weak one too or,
    where hold is set, by itself, since torch does not swap tensors that have weak references. What cannot be seen:
    edits through `.data` in place, and of inference tensors, which keep no count of them.
    """

    __slots__ = ("_hold", "_tensor", "address", "shape", "storage", "version")

    def __init__(self, tensor: Tensor, *, hold: bool = False) -> None:
        self._hold = hold
        self.look(tensor)

    def look(self, tensor: Tensor) -> None:
        """Take note of a tensor as it is now."""
        self._tensor: Callable[[], Tensor | None] = (lambda: tensor) if self._hold else weakref.ref(tensor)
        self.version, self.address, self.shape = _version(tensor), tensor.data_ptr(), tensor.shape
        self.storage = StorageWeakRef(tensor.untyped_storage())

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is that tensor, unedited as far as torch can tell."""
        return (
            self._tensor() is tensor
            and self.version == _version(tensor)
            and self.address == tensor.data_ptr()
            and self.storage.cdata == tensor.untyped_storage()._cdata
            and self.shape == tensor.shape
        )

    def forget(self) -> None:
        """Hold for no tensor until the next look."""
        self.version = -1


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version

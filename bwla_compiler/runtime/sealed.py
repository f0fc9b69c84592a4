"""Sealed modules: compiled code looks at their tensors at every call, and at nothing else of them.

Dynamo would check some twenty facts of a packed linear before each call: which buffers are None, which attributes there
are not. None of them changes unless someone sets, adds or deletes an attribute, and a sealed module notices that by
itself: it then changes EDITS, which all compiled code that relies on a sealed module checks once a call.
"""

from typing import Any

from torch import Tensor, nn

EDITS = "0"
"""Which edits compiled code has seen; a string, since Dynamo would take a number that changed for any number."""

WATCHED = frozenset({"training", "activation_bits"})
"""Attributes that make no edit: what compiled code does not read, and what it checks itself."""

SHAPED = "signs"
"""The tensor whose shape decides that of a result: another one of the same shape makes no edit."""

_RELIED_ON = "_relied_on"
_ABSENT = object()


class Sealed(nn.Module):
    """A module whose forward calls `unedited`, and of whose attributes other than WATCHED compiled code is told."""

    def __setattr__(self, name: str, value: Any) -> None:
        before = _attribute(self, name)
        super().__setattr__(name, value)
        if not _alike(before, value) or (name == SHAPED and _shape(before) != _shape(value)):
            _edited(self, name)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        _edited(self, name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As of nn.Module."""
        before = _attribute(self, name)
        super().register_buffer(name, tensor, persistent)
        if not _alike(before, tensor):
            _edited(self, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of nn.Module."""
        before = _attribute(self, name)
        super().register_parameter(name, param)
        if not _alike(before, param):
            _edited(self, name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As of nn.Module."""
        super().add_module(name, module)
        _edited(self, name)


def unedited() -> None:
    """What forward calls, so that Dynamo guards the compiled code on EDITS."""
    if EDITS == "":
        raise AssertionError("EDITS is never empty")


def rely_on(module: Sealed) -> None:
    """From now on, count edits of the module."""
    module.__dict__[_RELIED_ON] = True


def _edited(module: Sealed, name: str) -> None:
    global EDITS
    if module.__dict__.get(_RELIED_ON) and name not in WATCHED:
        EDITS = str(int(EDITS) + 1)


def _attribute(module: nn.Module, name: str) -> Any:
    for place in ("_buffers", "_parameters", "_modules"):
        if name in (held := module.__dict__.get(place, {})):
            return held[name]
    return module.__dict__.get(name, _ABSENT)


def _shape(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None


def _alike(before: Any, after: Any) -> bool:
    """Whether compiled code serves both: tensors are passed to it anew at every call."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return True
    return before is after or (type(before) is type(after) and isinstance(after, (int, float, str)) and before == after)

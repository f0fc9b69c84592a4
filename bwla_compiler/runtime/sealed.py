"""Sealed modules: one text says all that compiled code relies on of a module, but for the values of its tensors.

Dynamo would check some twenty facts of a packed linear before each call: which buffers are None, which attributes there
are not. A sealed module keeps them all in the text `facts`, made anew when an attribute is set, added or deleted; one
guard on it stands for the others, and tells one instance from another that was packed otherwise.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

WATCHED = frozenset({"training"})
"""Attributes that are no facts: what compiled code checks itself."""

FACTS = "facts"
_APART = WATCHED | {FACTS, "anchor", *vars(nn.Module())}
TENSORS = ("_buffers", "_parameters")
_PLAIN = (bool, int, float, str, bytes, tuple, frozenset, type(None), torch.dtype, torch.device)


class Sealed(nn.Module):
    """A module whose __init__ ends with `seal`, and whose forward calls `unedited`."""

    facts: str = ""

    def seal(self) -> None:
        """Note the facts, from now on after every edit."""
        self.__dict__[FACTS] = sys.intern(_facts(self))  # modules that are alike share it: guards compare addresses

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self._edited(name)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._edited(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As of nn.Module."""
        super().register_buffer(name, tensor, persistent)
        self._edited(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of nn.Module."""
        super().register_parameter(name, param)
        self._edited(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As of nn.Module."""
        super().add_module(name, module)
        self._edited(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._edited("")
        return self

    def _edited(self, name: str) -> None:
        if FACTS in self.__dict__ and name not in WATCHED:
            self.seal()


def unedited(module: Sealed) -> None:
    """What forward calls, so that Dynamo guards the compiled code on the module's facts."""
    if module.facts == "-":
        raise AssertionError("facts are never this")


def tensor_fact(tensor: Tensor | None) -> str:
    """Return what is a fact of a tensor: dtype and shape, but not where it is: what is loaded later is on none."""
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _facts(module: Sealed) -> str:
    held = vars(module)
    facts = [f"{name}: {tensor_fact(tensor)}" for place in TENSORS for name, tensor in sorted(held[place].items())]
    facts += [f"{name}: {type(part).__qualname__} {_whose(part)}" for name, part in held["_modules"].items()]
    facts += [f"{name}= {_value(value)}" for name, value in sorted(held.items()) if name not in _APART]
    return "\n".join(facts)


def _whose(part: nn.Module | None) -> str:
    """Return nothing for a part that is sealed itself; of others, whose insides nothing tells, which one it is."""
    return "" if part is None or isinstance(part, Sealed) else str(id(part))


def _value(value: Any) -> str:
    """Return an attribute as text that is the same for equal ones alone: of other objects, which one it is."""
    frozen = getattr(type(value), "__dataclass_params__", None)
    plain = isinstance(value, _PLAIN) or (frozen is not None and frozen.frozen)
    return repr(value) if plain else f"{type(value).__qualname__} {id(value)}"

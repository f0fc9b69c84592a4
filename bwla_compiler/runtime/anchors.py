"""Anchors: in a compiled graph for the CPU one empty tensor stands for all that a packed module holds.

A packed linear has some seven tensors. As inputs of a graph Dynamo would trace each, and fetch each from its module
before every call, which for a thousand of them takes longer than a tenth of a small model's step. So forward hands it
the module's `anchor` and its facts; what runs the graph finds the tensors themselves by these, at every call or, where
C++ has bound them, whenever REPLACED tells that a module holds another tensor than before.
"""

import functools
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bwla_compiler.codegen import triton_module
from bwla_compiler.errors import BwlaError, ShapeError
from bwla_compiler.runtime.sealed import TENSORS, Sealed, tensor_fact
from bwla_compiler.settings import chosen_kernels

REPLACED = 0
"""How often a tensor was put in or taken out of a module whose tensors were asked for."""

LINEAR_PARTS = (
    "signs", "row_scale", "column_scale", "low_rank_in", "low_rank_out", "low_rank_scale", "bias",
    "row_scale_exponent", "column_scale_exponent", "low_rank_scale_exponent",
)  # fmt: skip
TRANSFORM_PARTS = ("scale", "left", "right", "scale_exponent", "left_exponent", "right_exponent")
NORM_PARTS = ("weight", "bias")
"""The tensors that the operators bwla::linear, bwla::transform and bwla::prologue take, in their order."""


class Anchored(Sealed):
    """A sealed module with an anchor of its own: `__init__` makes it, and so does every copy."""

    anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._make_anchor()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "anchor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._make_anchor()

    def _make_anchor(self) -> None:
        """Make a new anchor: an attribute, which no cast and no move of the model touches."""
        anchor = torch.empty(0, dtype=torch.int8, device="cpu")
        anchor._bwla_module = weakref.ref(self)  # type: ignore[attr-defined]
        self.__dict__["anchor"] = anchor


def anchors_serve() -> bool:
    """Whether a graph for the CPU that Dynamo traces is to see anchors: not in exported ones, which have their tensors,
    and not where kernels that read the tensors themselves may be in it: Triton's, interpreted.

    The forwards that ask this ask for Dynamo and a CPU themselves, each in its own words: a function that Dynamo traces
    into takes it some milliseconds, and a model has hundreds of these calls. For the same reason they do not call
    `unedited` on that path: handing over the facts guards them.
    """
    if torch.compiler.is_exporting():
        return False
    return not (chosen_kernels() == "triton" and triton_module.installed() and triton_module.interpreted())


# As torch.compiler.assume_constant_result would, which imports Dynamo, and with it Triton, whoever imports us.
anchors_serve._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Watched(dict[str, Tensor | None]):
    """The buffers or parameters of a module, counting in REPLACED what is put in and taken out."""

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        super().__setitem__(name, tensor)
        _count()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        _count()

    def _counted(method: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[misc]
        @functools.wraps(method)
        def call(self: dict[str, Any], *arguments: Any, **named: Any) -> Any:
            found = method(self, *arguments, **named)
            _count()
            return found

        return call

    pop, popitem, clear = _counted(dict.pop), _counted(dict.popitem), _counted(dict.clear)
    update, setdefault, __ior__ = _counted(dict.update), _counted(dict.setdefault), _counted(dict.__ior__)


def _count() -> None:
    global REPLACED
    REPLACED += 1


def module_of(anchor: Tensor) -> nn.Module:
    """Return the module that an anchor stands for. Raises BwlaError where it is gone, or for another tensor."""
    ref = getattr(anchor, "_bwla_module", None)
    module: nn.Module | None = None if ref is None else ref()
    if module is None or module.__dict__.get("anchor") is not anchor:
        raise BwlaError("compiled code was called with what stands for no packed module: it, or a copy, is gone by now")
    return module


def part_of(anchor: Tensor, name: str) -> Tensor | None:
    """Return the tensor of this name that an anchor's module holds now. Raises what `module_of` raises."""
    held = module_of(anchor).__dict__
    for place in TENSORS:
        if type(held[place]) is not _Watched:
            held[place] = _Watched(held[place])
        if name in held[place]:
            found: Tensor | None = held[place][name]
            return found
    return None


@functools.lru_cache(maxsize=4096)
def parts(facts: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape by name of the tensors that a module of these facts holds."""
    return {
        name: (getattr(torch, dtype), tuple(int(size) for size in shape.split(", ") if size))
        for name, dtype, shape in re.findall(r"^(\w+): torch\.(\w+) \[([\d, ]*)\]$", facts, re.MULTILINE)
    }


def check_parts(anchor: Tensor, facts: str) -> None:
    """Raise ShapeError where a module holds tensors of other shapes than compiled code was made for.

    Dynamo is told of edits by attribute; so these were made in place, or behind the module's back.
    """
    lines = set(facts.split("\n"))
    held = module_of(anchor).__dict__
    for name, found in (*held["_buffers"].items(), *held["_parameters"].items()):
        if f"{name}: {tensor_fact(found)}" not in lines:
            then = next((line for line in lines if line.startswith(f"{name}: ")), f"{name}: none")
            raise ShapeError(
                f"{name} of a compiled module is {tensor_fact(found)} by now; compiled for {then}: call "
                "torch._dynamo.reset() after such an edit"
            )


def linear_of(x: Tensor, anchor: Tensor, facts: str, activation_bits: int) -> Tensor:
    """Implementation of bwla::linear_of: bwla::linear with the tensors that the anchor stands for."""
    check_parts(anchor, facts)
    tensors = [part_of(anchor, name) for name in LINEAR_PARTS]
    y: Tensor = torch.ops.bwla.linear.default(x, *tensors[:7], activation_bits, *tensors[7:])
    return y


def transform_of(x: Tensor, anchor: Tensor, facts: str) -> Tensor:
    """Implementation of bwla::transform_of: bwla::transform with the tensors that the anchor stands for."""
    check_parts(anchor, facts)
    y: Tensor = torch.ops.bwla.transform.default(x, *(part_of(anchor, name) for name in TRANSFORM_PARTS))
    return y


def prologue_of(x: Tensor, anchor: Tensor, facts: str, kind: str, eps: float) -> Tensor:
    """Implementation of bwla::prologue_of: bwla::prologue with the tensors that the anchor stands for."""
    check_parts(anchor, facts)
    y: Tensor = torch.ops.bwla.prologue.default(x, kind, eps, *(part_of(anchor, name) for name in NORM_PARTS))
    return y


def part(anchor: Tensor, name: str, facts: str) -> Tensor:
    """Implementation of bwla::part: a copy of one tensor, since whoever compiles a graph may write over a result."""
    check_parts(anchor, facts)
    found = part_of(anchor, name)
    assert found is not None
    return found.clone()


def fake_linear_of(x: Tensor, anchor: Tensor, facts: str, activation_bits: int) -> Tensor:
    """Return a tensor like the result of `linear_of`."""
    return x.new_empty([*x.shape[:-1], parts(facts)["signs"][1][1]])


def fake_part(anchor: Tensor, name: str, facts: str) -> Tensor:
    """Return a tensor like the result of `part`."""
    dtype, shape = parts(facts)[name]
    return anchor.new_empty(shape, dtype=dtype)

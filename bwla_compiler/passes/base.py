"""What a pass is: it reads a plan and a model, and answers with typed edits and reasons; it edits nothing itself.

One pass so serves two roads: `apply.apply_module` performs edits on an nn.Module. The list of edits is what
the inspector shows.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from bwla_compiler.graph.plan import Expression, Plan
from bwla_compiler.passes.own_recipes import OwnRecipes, own_recipes
from bwla_compiler.recipe import Recipe


@dataclass(frozen=True)
class Untie:
    """Give a head that shares the embedding's tensor a copy of its own."""

    embedding: str
    head: str

    def __str__(self) -> str:
        return f"{self.head} gets its own copy of {self.embedding}"


@dataclass(frozen=True)
class ScaleParameter:
    """Multiply a parameter along one axis by factor [size of the axis]."""

    parameter: str
    axis: int
    factor: Tensor

    def __str__(self) -> str:
        return f"{self.parameter} scaled along axis {self.axis}"


@dataclass(frozen=True)
class ShiftBias:
    """Add W @ shift to a linear's bias (made where there is none); shift [in]."""

    linear: str
    in_axis: int
    shift: Tensor

    def __str__(self) -> str:
        return f"{self.linear}.bias takes a norm's shift"


@dataclass(frozen=True)
class DropGain:
    """Fill a norm's parameter with the value that makes it do nothing."""

    parameter: str
    value: float

    def __str__(self) -> str:
        return f"{self.parameter} set to {self.value:g}"


@dataclass(frozen=True)
class RotateParameter:
    """Multiply a parameter along one axis by the matrix of its basis; rotations [n, n] by basis name."""

    parameter: str
    axis: int
    expression: Expression
    rotations: Mapping[str, Tensor]

    def __str__(self) -> str:
        return f"{self.parameter} axis {self.axis} rotated by {self.expression}"


@dataclass(frozen=True)
class InsertTransform:
    """Put x -> (x * scale)(left (x) right) before linears, and its inverse into their weights: nothing changes.

    linears: (name, input axis of the weight). scale [n], left [n1, n1], right [n2, n2] or, of diag(v) H, v [n2]; None
    is the identity.
    """

    linears: tuple[tuple[str, int], ...]
    scale: Tensor | None
    left: Tensor | None
    right: Tensor | None
    kind: Literal["kronecker", "hadamard"]

    def __str__(self) -> str:
        shape = " x ".join("1" if m is None else str(m.shape[0]) for m in (self.left, self.right))
        names = ", ".join(name for name, _ in self.linears)
        smoothing = " after smoothing" if self.scale is not None else ""
        return f"{names}: online {self.kind} {shape}{smoothing}"


@dataclass(frozen=True)
class ReplaceModule:
    """Put a packed module where a float one was."""

    name: str
    module: nn.Module

    def __str__(self) -> str:
        return f"{self.name} becomes {type(self.module).__name__}"


Edit = Untie | ScaleParameter | ShiftBias | DropGain | RotateParameter | InsertTransform | ReplaceModule


@dataclass
class PassReport:
    """What a pass did, and what it left alone with the reason; seconds of wall time."""

    name: str
    edits: list[Edit] = field(default_factory=list)
    changed: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def change(self, what: str, *edits: Edit) -> None:
        """Record edits made for the sake of one thing."""
        self.edits.extend(edits)
        self.changed.extend((what, str(edit)) for edit in edits)

    def skip(self, what: str, reason: str) -> None:
        """Record what is left alone."""
        self.skipped.append((what, reason))


@dataclass(frozen=True)
class PassContext:
    """What a pass may read: the model as it is now, its plan, the recipe, and a seed."""

    model: nn.Module
    plan: Plan
    recipe: Recipe
    seed: int = 0

    @cached_property
    def own(self) -> OwnRecipes:
        """The recipe that holds for each linear of the plan, None where it is kept."""
        return own_recipes(self.plan, self.recipe)

    def parameter(self, name: str) -> Tensor:
        """Return a parameter's values."""
        return self.model.get_parameter(name).detach()

    def generator(self, name: str) -> torch.Generator:
        """Return a generator that depends on the seed and on a name alone, so that order does not matter."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{name}".encode()))


class Pass(Protocol):
    """A frozen dataclass; its fields are its options."""

    name: ClassVar[str]

    def run(self, ctx: PassContext) -> PassReport:
        """Return edits and reasons; the model is not touched."""
        ...

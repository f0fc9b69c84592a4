"""FoldRotations: one orthogonal matrix per free basis, multiplied into every parameter axis that lives in it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bwla_compiler.cost.factors import kronecker_factors
from bwla_compiler.graph.plan import Axis, Basis
from bwla_compiler.numerics.kronecker import apply_kronecker, haar, hadamard
from bwla_compiler.passes.base import PassContext, PassReport, RotateParameter

RESIDUAL = "residual"


@dataclass(frozen=True)
class KroneckerRotation:
    """Rows turn as x' = x diag(signs) (left (x) right): dense where it is folded, two small factors where online.

    signs [n] of +-1; left [n1, n1], right [n2, n2] orthogonal; None is the identity.
    """

    signs: Tensor | None
    left: Tensor | None
    right: Tensor | None

    @staticmethod
    def identity() -> "KroneckerRotation":
        """Return the rotation that does nothing."""
        return KroneckerRotation(None, None, None)

    def apply(self, rows: Tensor) -> Tensor:
        """Return rows [..., n] turned."""
        rows = rows if self.signs is None else rows * self.signs.to(rows)
        return apply_kronecker(rows, self.left, self.right)

    def undo(self, rows: Tensor) -> Tensor:
        """Return rows [..., n] turned back."""
        rows = apply_kronecker(rows, *self.inverse_factors())
        return rows if self.signs is None else rows * self.signs.to(rows)

    def inverse_factors(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the factors that `undo` applies before the signs."""
        left, right = (None if m is None else m.T.contiguous() for m in (self.left, self.right))
        return left, right

    def matrix(self, n: int) -> Tensor:
        """Return R [n, n] float64 with x' = R x for columns x."""
        return self.apply(torch.eye(n, dtype=torch.float64)).T


def residual_rotation(ctx: PassContext, basis: Basis) -> KroneckerRotation:
    """Return the residual stream's rotation, a function of seed and basis alone: randomised Hadamard factors.

    Its Kronecker form lets a tied embedding keep its own basis at the price of two small transforms.
    """
    generator = ctx.generator(basis.name)
    fixes_ones = basis.freedom == "fixes-ones"
    n1, n2 = kronecker_factors(basis.size)
    left = hadamard(n1, generator=generator, fixes_ones=fixes_ones)
    right = hadamard(n2, generator=generator, fixes_ones=fixes_ones)
    if fixes_ones:  # a sign would not keep the ones vector
        return KroneckerRotation(None, left, right)
    signs = torch.randint(0, 2, (basis.size,), generator=generator) * 2.0 - 1.0
    return KroneckerRotation(signs.to(torch.float64), left, right)


def _added_biases(ctx: PassContext) -> Iterator[Axis]:
    """Yield the biases that a folded shift has given to linears without one: the plan cannot know of them.

    They live where the linear's output does.
    """
    planned = {axis.parameter for axis in ctx.plan.axes}
    shifted = {name for norm in ctx.plan.norms if norm.shift is not None for name in norm.absorbed_by}
    for linear in ctx.plan.linears:
        name = f"{linear.name}.bias"
        if linear.bias is not None or linear.name not in shifted or name in planned:
            continue
        if getattr(ctx.model.get_submodule(linear.name), "bias", None) is not None:
            yield Axis(name, 0, linear.output)


@dataclass(frozen=True)
class FoldRotations:
    """Rotate free bases at no run-time cost: writers W -> R W, readers W -> W R^T. Exact.

    kind: randomised "hadamard", or "haar" (uniform). every: also bases that no linear reads (queries and keys
    without a rotary embedding); else those whose rotation quantization gains from. residual: whether the
    residual stream is among them.
    """

    kind: Literal["hadamard", "haar"] = "hadamard"
    every: bool = False
    residual: bool = True
    name: ClassVar[str] = "fold-rotations"

    def run(self, ctx: PassContext) -> PassReport:
        """Emit one edit per parameter axis that lives in a rotated basis."""
        report = PassReport(self.name)
        rotations: dict[str, Tensor] = {}
        for basis in ctx.plan.bases:
            if reason := self.refusal(basis):
                report.skip(basis.name, reason)
            else:
                rotations[basis.name] = self._matrix(ctx, basis)
        for axis in (*ctx.plan.axes, *_added_biases(ctx)):
            names = [leaf.basis for leaf in axis.expression.leaves() if leaf.basis in rotations]
            if names:
                used = {n: rotations[n] for n in names}
                report.change(", ".join(used), RotateParameter(axis.parameter, axis.axis, axis.expression, used))
        return report

    def refusal(self, basis: Basis) -> str:
        """Return why a basis is not rotated, or ""."""
        if basis.freedom == "pinned":
            return basis.reason
        if not self.every and not basis.readers:
            return "no linear reads it: nothing to gain"
        if not self.residual and basis.name == RESIDUAL:
            return "the recipe keeps the residual stream in its own basis"
        return ""

    def _matrix(self, ctx: PassContext, basis: Basis) -> Tensor:
        if self.kind == "hadamard" and basis.name == RESIDUAL:
            return residual_rotation(ctx, basis).matrix(basis.size)
        make = haar if self.kind == "haar" else hadamard
        return make(basis.size, generator=ctx.generator(basis.name), fixes_ones=basis.freedom == "fixes-ones")

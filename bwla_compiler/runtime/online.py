"""OnlineTransform: a change of basis of the activations that is computed at run time."""

from typing import Literal, Self

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.kronecker import is_signs
from bwla_compiler.runtime import ops
from bwla_compiler.runtime.anchors import TRANSFORM_PARTS, Anchored, anchors_serve
from bwla_compiler.runtime.checks import is_square
from bwla_compiler.runtime.halves import read_half, register_empty_half, register_half, whole_factor
from bwla_compiler.runtime.sealed import unedited
from bwla_compiler.spec import TransformSpec

assert ops.LIBRARY is not None  # defines the operators

TRANSFORM, TRANSFORM_OF = torch.ops.bwla.transform.default, torch.ops.bwla.transform_of.default

Kind = Literal["none", "folded", "kronecker", "hadamard"]


class OnlineTransform(Anchored):
    """x -> (x * scale) (left (x) right): X [n1, n2] -> left^T X right for each token; each part may be absent.

    Saved: scale [n], left [n1, n1], right [n2, n2], or [n2] where it is a Hadamard matrix behind a diagonal, each as
    int16 float16 bits and an int8 exponent. Arithmetic is float32. OnlineTransform(spec, device=...) is empty, to be
    loaded; `from_factors` takes values.
    """

    def __init__(self, spec: TransformSpec, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        n = spec.n1 * spec.n2
        register_empty_half(self, "scale", (n,) if spec.scaled else None, device=device)
        register_empty_half(self, "left", (spec.n1, spec.n1) if spec.left else None, device=device)
        register_empty_half(self, "right", _right_shape(spec), device=device)
        self.seal()

    @classmethod
    def from_factors(cls, scale: Tensor | None, left: Tensor | None, right: Tensor | None, *, kind: Kind) -> Self:
        """Return the transform with these factors, rounded to float16: scale [n], left [n1, n1], right [n2, n2].

        right [n2] is the diagonal v of diag(v) H, see `signed_hadamard`.
        Raises ShapeError where they do not fit, WeightError where they are not finite.
        """
        n = scale.numel() if scale is not None else 0
        n1 = left.shape[0] if left is not None else 0
        n2 = right.shape[0] if right is not None else 0
        n1, n2 = n1 or (n // n2 if n2 else 1), n2 or (n // max(n1, 1) or 1)
        if n and n1 * n2 != n:
            raise ShapeError(f"factors of {n1} and {n2} channels do not multiply to the {n} channels of the scale")
        for name, factor in (("left", left), ("right", right)):
            if factor is not None and not (is_square(factor) or (name == "right" and is_signs(factor))):
                raise ShapeError(f"{name} factor has shape {list(factor.shape)}: it must be square")
        signed = right is not None and right.dim() == 1
        spec = TransformSpec(kind, n1, n2, left is not None, right is not None, scale is not None, signed)
        transform = cls(spec, device="meta")
        for name, values in (("scale", scale), ("left", left), ("right", right)):
            register_half(transform, name, values)
        return transform

    def factors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (scale, left, right) as they act, float32, None for the absent. Not to be edited."""
        right = read_half(self, "right")
        return read_half(self, "scale"), read_half(self, "left"), None if right is None else whole_factor(right)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., n], dtype of x."""
        result: Tensor
        if is_dynamo_compiling() and anchors_serve() and x.device.type == "cpu":
            result = TRANSFORM_OF(x, self.anchor, self.facts)
        else:
            unedited(self)
            b = self._buffers  # looked up directly: a module's __getattr__ costs as much as a small kernel
            result = TRANSFORM(x, *[b[name] for name in TRANSFORM_PARTS])
        return result

    def extra_repr(self) -> str:
        parts = [name for name in ("scaled", "left", "right") if getattr(self.spec, name)]
        return f"{self.spec.kind}, {self.spec.n1} x {self.spec.n2}, {' '.join(parts) or 'identity'}"


def _right_shape(spec: TransformSpec) -> tuple[int, ...] | None:
    """Return the shape in which the right factor is stored, None where there is none."""
    if not spec.right:
        return None
    return (spec.n2,) if spec.signed else (spec.n2, spec.n2)

"""Students: differentiable stand-ins of packed modules, for the time of tuning.

A binary product unpacks its signs in the forward pass and again in the backward pass, so that of all weights the bits
stay in memory, and of one linear at a time the floats. Where signs learn, each has a latent number beside it whose
sign it is (the straight-through estimator; BinaryConnect, 1511.00363), kept as float16: the gradient of one linear's
weight moves its latents at once, inside the backward pass, and is forgotten.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bwla_compiler.calibrate.hooks import Hooks
from bwla_compiler.graph.planner import block_of
from bwla_compiler.numerics.kronecker import apply_kronecker
from bwla_compiler.numerics.planes import BinaryWeight, pack_signs, unpack_signs
from bwla_compiler.passes.apply import replace_module
from bwla_compiler.runtime.halves import read_half, register_half
from bwla_compiler.runtime.modules import EndLinear, OnlineTransform, PackedLinear, TiedHead
from bwla_compiler.runtime.portable import GROUP
from bwla_compiler.spec import FLOAT_BITS


@contextmanager
def students(model: nn.Module) -> Iterator[list["Student"]]:
    """Hold differentiable stand-ins in the model's place of packed modules; afterwards pack what they became.

    After an error the packed modules are back as they were.
    """
    packed = [(n, m) for n, m in model.named_modules() if isinstance(m, (PackedLinear, TiedHead, EndLinear))]
    diagonals: dict[int, Diagonal] = {}
    found: dict[str, Student] = {}
    hooks = Hooks(model)
    try:
        for name, module in packed:
            if isinstance(module, PackedLinear):
                found[name] = Student(module, diagonals, block=block_of(f"{name}."))
                replace_module(model, name, found[name])
            else:
                replace_module(model, name, _Head(module))
        hooks.put_back(model)
        yield [*found.values()]
    except BaseException:
        for name, module in packed:
            replace_module(model, name, module)
        raise
    with torch.no_grad():
        for diagonal in diagonals.values():
            diagonal.store()
        for name, module in packed:
            student = found.get(name)
            replace_module(model, name, module if student is None else student.packed())
    hooks.put_back(model)


class Diagonal(nn.Module):
    """An online transform whose diagonal, where it has one, is tuned: scale * exp(change)."""

    def __init__(self, transform: OnlineTransform) -> None:
        super().__init__()
        self.source = (transform,)  # a tuple hides it from nn.Module's registration
        self.scale, self.left, self.right = transform.factors()
        size = 0 if self.scale is None else self.scale.numel()
        self.change = nn.Parameter(torch.zeros(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.scale is None else x * (self.scale * self.change.exp())
        return apply_kronecker(x, self.left, self.right)

    def store(self) -> None:
        """Put the tuned diagonal into the transform."""
        if self.scale is not None:
            register_half(self.source[0], "scale", self.scale * self.change.exp())


class Planes:
    """The signs [planes, out, in] of one linear: bits, and while they learn a latent float16 each.

    rate: how far a latent, 1 at the start, moves a step, over its gradient's expected size: the root mean square of its
    row times that of its column, over that of all (the second moments of Adafactor, 1804.04235).
    """

    def __init__(self, packed: Tensor, in_features: int) -> None:
        self.bits, self.in_features = packed, in_features
        self.latent: Tensor | None = None
        self.rate = 0.0

    def wake(self) -> None:
        """Have the signs learn from now on."""
        self.latent = unpack_signs(self.bits, self.in_features).half()

    def sleep(self) -> None:
        """Keep the signs as they have become, as bits."""
        self.bits, self.latent, self.rate = self.packed(), None, 0.0

    def signs(self) -> Tensor:
        """Return the signs as float32."""
        if self.latent is None:
            return unpack_signs(self.bits, self.in_features).float()
        return torch.where(self.latent < 0, -1.0, 1.0)

    def packed(self) -> Tensor:
        """Return the signs as bits."""
        return self.bits if self.latent is None else pack_signs(torch.where(self.latent < 0, -1, 1))

    def wide(self, scales: Tensor) -> Tensor:
        """Return scales [planes, out, groups] per column: [planes, out, in], or [planes, out, 1] of one group."""
        return scales if scales.shape[2] == 1 else scales.repeat_interleave(GROUP, 2)[..., : self.in_features]

    def by_group(self, values: Tensor, n_groups: int) -> Tensor:
        """Return the sums [planes, out, groups] of values [planes, out, in] over the columns of each group."""
        if n_groups == 1:
            return values.sum(2, keepdim=True)
        return torch.stack([part.sum(2) for part in values.split(GROUP, 2)], 2)

    def learn(self, gradient: Tensor) -> None:
        """Move the latents against the gradient [out, in] of the weight; the scales, being positive, keep its sign."""
        if self.latent is not None and self.rate > 0:
            squares = gradient.square()
            rows, columns = squares.mean(1, keepdim=True), squares.mean(0)
            tiny = torch.finfo(gradient.dtype).tiny
            gradient.mul_(columns.clamp_min(tiny).rsqrt_()).mul_(rows.clamp_min(tiny).rsqrt_())
            self.latent.sub_(gradient.mul_(self.rate * rows.mean().sqrt()))


class _Product(torch.autograd.Function):
    """x W^T with W = sum_p scale_p B_p, unpacked both times; the signs learn in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, planes: Planes) -> Tensor:
        ctx.planes = planes
        ctx.save_for_backward(x, scales)
        return linear(x, (planes.wide(scales) * planes.signs()).sum(0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        planes: Planes = ctx.planes
        x, scales = ctx.saved_tensors
        of_weight = gradient.flatten(0, -2).mT @ x.flatten(0, -2)
        signs = planes.signs()
        of_scales = planes.by_group(of_weight * signs, scales.shape[2])
        of_x = gradient @ (planes.wide(scales) * signs).sum(0) if ctx.needs_input_grad[0] else None
        planes.learn(of_weight)
        return of_x, of_scales, None


class Student(nn.Module):
    """A packed linear in floats: y = sum_p a_p exp(scale_p) (B_p q(x)) + onto (into q(x)) + bias.

    block: the repeated block of the model that it stands in.
    """

    def __init__(self, linear: PackedLinear, diagonals: dict[int, Diagonal], *, block: str = "") -> None:
        super().__init__()
        self.source, self.block = (linear,), block
        self.activation_bits = linear.activation_bits
        self.diagonal: Diagonal | None = None
        if linear.transform is not None:
            self.diagonal = diagonals.setdefault(id(linear.transform), Diagonal(linear.transform))
        self.planes = Planes(linear.canonical_signs(), linear.in_features)
        first, self.column_scale = read_half(linear, "row_scale"), read_half(linear, "column_scale")
        assert first is not None
        self.first = first
        self.scale = nn.Parameter(torch.zeros_like(first), requires_grad=False)
        self.pair_scale: Tensor | None
        self.onto, self.into, self.pair_scale = _pair(linear)
        self.bias, self.bias_size = _sized(linear.bias)

    @property
    def weight(self) -> Tensor:
        """What code that asks the linear for shape, dtype or device gets."""
        return self.source[0].weight

    def scales(self) -> Tensor:
        """Return the scales [planes, out, groups]."""
        return self.first * self.scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        inner = x.float() if self.diagonal is None else self.diagonal(x.float())
        inner = inner if self.column_scale is None else inner * self.column_scale
        inner = _rounded(inner, bits=self.activation_bits)
        y: Tensor = _Product.apply(inner, self.scales(), self.planes)  # type: ignore[no-untyped-call]
        pair = self.pair()
        if pair is not None:
            y = y + linear(linear(inner, pair[1]), pair[0])
        y = y if self.bias is None else y + self.bias * self.bias_size
        return y.to(x.dtype)

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Return the low-rank pair [out, rank] and [rank, in], which reads the scaled columns; None for none."""
        if self.onto is None or self.into is None or self.pair_scale is None:
            return None
        return self.onto * self.pair_scale, self.into

    def stored_bias(self) -> Tensor | None:
        """Return the bias in the dtype that it came in."""
        before = self.source[0].bias
        return None if self.bias is None or before is None else (self.bias * self.bias_size).to(before.dtype)

    def packed(self) -> PackedLinear:
        """Return the linear that is stored."""
        linear = self.source[0]
        onto, into = self.pair() or (None, None)
        if into is not None and self.column_scale is not None:
            into = into * self.column_scale  # as BinaryWeight has it: beside the planes, not behind their columns
        weight = BinaryWeight(
            self.planes.signs().to(torch.int8),
            self.scales(),
            column_scale=self.column_scale,
            low_rank_out=onto,
            low_rank_in=into,
            group_size=GROUP if self.first.shape[2] > 1 else 0,
        )
        return PackedLinear.from_binary(
            weight,
            activation_bits=linear.activation_bits,
            transform=linear.transform,
            bias=self.stored_bias(),
            dtype=linear.typed.dtype,
        )


class _Head(nn.Module):
    """A head in floats, not tuned, through which gradients flow."""

    def __init__(self, head: TiedHead | EndLinear) -> None:
        super().__init__()
        self.weight = head.dense_weight()
        self.column_scale, self.bias = read_half(head, "column_scale"), head.bias
        self.transform = None if head.transform is None else head.transform.factors()

    def forward(self, x: Tensor) -> Tensor:
        inner = x.float()
        if self.transform is not None:
            scale, left, right = self.transform
            inner = apply_kronecker(inner if scale is None else inner * scale, left, right)
        inner = inner if self.column_scale is None else inner * self.column_scale
        return linear(inner, self.weight, self.bias).to(x.dtype)


def _sized(values: Tensor | None) -> tuple[nn.Parameter | None, float]:
    """Return values over their root mean square, and that; a power of two near it, so that no bit is lost."""
    if values is None:
        return None, 1.0
    size = float(values.float().square().mean().sqrt())
    size = 2.0 ** round(math.log2(size)) if size > 0 else 1.0
    return nn.Parameter(values.float() / size, requires_grad=False), size


def _pair(linear: PackedLinear) -> tuple[nn.Parameter | None, nn.Parameter | None, Tensor | None]:
    """Return the low-rank pair, each component of mean square 1, and the components' sizes [rank]."""
    scale = read_half(linear, "low_rank_scale")
    if linear.low_rank_out is None or linear.low_rank_in is None or scale is None:
        return None, None, None
    onto, into = linear.low_rank_out.float(), linear.low_rank_in.float()
    tiny = torch.finfo(torch.float32).tiny
    size_out, size_in = (f.square().mean(d).sqrt().clamp_min(tiny) for f, d in ((onto, 0), (into, 1)))
    pair = (
        nn.Parameter(onto / size_out, requires_grad=False),
        nn.Parameter(into / size_in[:, None], requires_grad=False),
    )
    return *pair, scale * size_out * size_in


def _rounded(x: Tensor, *, bits: int) -> Tensor:
    """Return x rounded per token, with the gradient of x itself."""
    if bits >= FLOAT_BITS:
        return x
    qmax = 2 ** (bits - 1) - 1
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True) / qmax
        scale = torch.where(scale > 0, scale, 1.0)
        error = (x / scale).round().clamp(-qmax, qmax) * scale - x
    return x + error

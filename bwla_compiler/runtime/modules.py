"""PackedLinear, and every other module of a quantized model by name.

Their state is integers, so that casting a model (`dtype=bfloat16`, `.half()`) leaves it as it was saved.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.planes import BinaryWeight, pack_signs, unpack_signs
from bwla_compiler.runtime.anchors import anchors_serve
from bwla_compiler.runtime.device_signs import DeviceSigns
from bwla_compiler.runtime.ends import EndEmbedding, EndLinear, TiedHead, int8_step
from bwla_compiler.runtime.experts import PackedExperts
from bwla_compiler.runtime.halves import read_half, register_empty_half, register_half
from bwla_compiler.runtime.online import OnlineTransform
from bwla_compiler.runtime.portable import GROUP
from bwla_compiler.runtime.sealed import unedited
from bwla_compiler.runtime.simulated import SimulatedLinear
from bwla_compiler.runtime.typed import register_typed, stand_in
from bwla_compiler.runtime.weight_spec import scale_kind, spec_of_weight
from bwla_compiler.spec import FLOAT_BITS, LinearSpec, TransformSpec

__all__ = [
    "EndEmbedding",
    "EndLinear",
    "OnlineTransform",
    "PackedExperts",
    "PackedLinear",
    "SimulatedLinear",
    "TiedHead",
    "set_activation_bits",
    "stored_bytes",
]

LINEAR, LINEAR_OF = torch.ops.bwla.linear.default, torch.ops.bwla.linear_of.default


class PackedLinear(DeviceSigns):
    """y = sum_p scale_p B_p q(x') + low rank + bias, x' the transformed input, q its rounding per token.

    Saved: signs uint8 [planes, out, ceil(in / 8)] in canonical order (on a GPU the buffer has the kernels' layout, see
    `DeviceSigns`); row_scale [planes, out, groups], column_scale
    [in], low_rank_scale [rank] as int16 float16 bits with int8 exponents; low_rank_in int8 [rank, in] and
    low_rank_out int8 [out, rank]; bias [out] float; the submodule `transform`. PackedLinear(spec, device=...) is
    empty, to be loaded; spec has one member. Raises ShapeError where the spec cannot be packed.
    """

    row_scale: Tensor
    low_rank_in: Tensor | None
    low_rank_out: Tensor | None
    bias: Tensor | None
    typed: Tensor

    def __init__(self, spec: LinearSpec, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        if len(spec.out_features) != 1:
            raise ShapeError(f"a spec of {len(spec.out_features)} members: a PackedLinear holds one")
        columns, out, rank = spec.in_features, spec.out_features[0], spec.rank
        groups = _groups(spec)
        self.in_features, self.out_features = columns, out
        self.activation_bits = spec.activation_bits
        online = spec.transform if spec.transform.online else None
        self.transform = OnlineTransform(online, device=device) if online else None
        self._kind = spec.transform.kind
        self.register_buffer("signs", _zeros(torch.uint8, spec.planes, out, -(-columns // 8), device=device))
        register_empty_half(self, "row_scale", (spec.planes, out, groups), device=device)
        has_columns = spec.scale_kind == "row+column"
        register_empty_half(self, "column_scale", (columns,) if has_columns else None, device=device)
        self.register_buffer("low_rank_in", _zeros(torch.int8, rank, columns, device=device) if rank else None)
        self.register_buffer("low_rank_out", _zeros(torch.int8, out, rank, device=device) if rank else None)
        register_empty_half(self, "low_rank_scale", (rank,) if rank else None, device=device)
        self.register_buffer("bias", _zeros(torch.float32, out, device=device) if spec.bias else None)
        register_typed(self, device=device)
        self.seal()

    @classmethod
    def from_binary(
        cls,
        weight: BinaryWeight,
        *,
        activation_bits: int,
        transform: OnlineTransform | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return the linear of this weight: scales rounded to float16, the low-rank pair to int8 by component.

        The weight is in the basis that `transform` (itself, not a copy, becomes the submodule) puts its input in.
        dtype: that of the model, for those who ask the linear for it.
        Raises ShapeError for groups other than of 128 columns, or for group and column scales together.
        """
        basis = transform.spec if transform is not None else None
        spec = spec_of_weight(weight, transform=basis, activation_bits=activation_bits, bias=bias is not None)
        linear = cls(spec, device="meta")
        linear.transform = transform
        linear.signs = pack_signs(weight.signs)
        register_half(linear, "row_scale", weight.scale)
        register_half(linear, "column_scale", weight.column_scale)
        linear._take_low_rank(weight)
        linear.bias = None if bias is None else bias.detach().clone()
        register_typed(linear, device=weight.signs.device, dtype=dtype)
        return linear

    @property
    def weight(self) -> Tensor:
        """For code that asks for dtype, device or shape: [out, in] of the model's dtype, all NaN."""
        return stand_in(self)

    @property
    def planes(self) -> int:
        """Number of binary planes."""
        return self.signs.shape[0]

    @property
    def rank(self) -> int:
        """Rank of the low-rank pair, 0 for none."""
        return 0 if self.low_rank_in is None else self.low_rank_in.shape[0]

    @property
    def spec(self) -> LinearSpec:
        """The shape and format of this linear, as it is now."""
        has_columns = getattr(self, "column_scale") is not None  # noqa: B009 (a buffer that may be None)
        return LinearSpec(
            in_features=self.in_features,
            out_features=(self.out_features,),
            planes=self.planes,
            scale_kind=scale_kind(groups=self.row_scale.shape[2], columns=has_columns),
            group_size=GROUP,
            rank=self.rank,
            transform=self.transform.spec if self.transform is not None else TransformSpec(kind=self._kind),
            activation_bits=self.activation_bits,
            bias=self.bias is not None,
        )

    def dense_weight(self) -> Tensor:
        """Return the weight [out, in] float32 that acts on the transformed input, activations not rounded."""
        scale, column_scale = read_half(self, "row_scale"), read_half(self, "column_scale")
        assert scale is not None
        wide = scale if scale.shape[2] == 1 else scale.repeat_interleave(GROUP, 2)[..., : self.in_features]
        weight = (wide * unpack_signs(self.canonical_signs(), self.in_features)).sum(0)
        rank_scale = read_half(self, "low_rank_scale")
        if self.low_rank_in is not None and self.low_rank_out is not None and rank_scale is not None:
            weight = weight + (self.low_rank_out.float() * rank_scale) @ self.low_rank_in.float()
        return weight if column_scale is None else weight * column_scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], dtype of x. Raises GradientError where a gradient is asked for."""
        transform = self._modules.get("transform")
        read = x if transform is None else transform(x.float())
        if is_dynamo_compiling() and anchors_serve() and x.device.type == "cpu":
            y: Tensor = LINEAR_OF(read, self.anchor, self.facts, self.activation_bits)
            return y if transform is None else y.to(x.dtype)
        unedited(self)
        b = self._buffers  # looked up directly: a module's __getattr__ costs as much as a small kernel
        y = LINEAR(
            read,
            b["signs"],
            b["row_scale"],
            b["column_scale"],
            b["low_rank_in"],
            b["low_rank_out"],
            b["low_rank_scale"],
            b["bias"],
            self.activation_bits,
            b["row_scale_exponent"],
            b["column_scale_exponent"],
            b["low_rank_scale_exponent"],
        )
        return y if transform is None else y.to(x.dtype)

    def extra_repr(self) -> str:
        bits = 8 * stored_bytes(self) / max(1, self.in_features * self.out_features)
        activations = f"A{self.activation_bits}"
        return f"in={self.in_features}, out={self.out_features}, {bits:.3f} bits a weight, {activations}"

    def _take_low_rank(self, weight: BinaryWeight) -> None:
        """Store the pair as int8 with one scale per component; its input side reads x * column_scale, hence / it."""
        if weight.low_rank_in is None or weight.low_rank_out is None:
            return
        into, onto = weight.low_rank_in.float(), weight.low_rank_out.float()
        column_scale = read_half(self, "column_scale")
        if column_scale is not None:
            into = torch.where(column_scale == 0, 0.0, into / column_scale)
        in_scale, out_scale = int8_step(into, 1), int8_step(onto, 0)
        register_half(self, "low_rank_scale", (in_scale * out_scale.T).flatten())
        self.low_rank_in = (into / in_scale).round().to(torch.int8)
        self.low_rank_out = (onto / out_scale).round().to(torch.int8)


def set_activation_bits(model: nn.Module, bits: int) -> None:
    """Set the activation bits of packed linears and experts: 2 to 8, 16 for floats. Raises ShapeError for others."""
    if not (2 <= bits <= 8 or bits == FLOAT_BITS):
        raise ShapeError(f"activations of {bits} bits: expected 2 to 8, or {FLOAT_BITS}")
    for module in model.modules():
        if isinstance(module, (PackedLinear, PackedExperts, SimulatedLinear)):
            module.activation_bits = bits
    described = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "modules", {})
    for entry in described.values():  # what is saved with the model
        if "spec" in entry:
            entry["spec"]["activation_bits"] = bits


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of the saved buffers and parameters of a module and its children."""
    return sum(
        t.numel() * t.element_size() for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)
    )


def _zeros(dtype: torch.dtype, *shape: int, device: torch.device | str | None) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def _groups(spec: LinearSpec) -> int:
    """Return the scales a row. Raises ShapeError for groups that the kernels do not know."""
    if spec.scale_kind == "group" and spec.group_size != GROUP:
        raise ShapeError(f"groups of {spec.group_size} columns: kernels take groups of {GROUP}")
    return -(-spec.in_features // GROUP) if spec.scale_kind == "group" else 1

"""The ends of a model in codes of 8 or 4 bits: embeddings, heads, and heads that read the codes of an embedding."""

from typing import Self

import torch
from torch import Tensor, nn

from bwla_compiler.numerics.nibbles import dequantized, group_scales, nibble_codes
from bwla_compiler.runtime.halves import read_half, register_empty_half, register_half
from bwla_compiler.runtime.online import TRANSFORM, OnlineTransform
from bwla_compiler.runtime.typed import register_typed, stand_in
from bwla_compiler.spec import INT8_ROWS, Coding

Device = torch.device | str | None

INT8_LIMIT = 127

ROWS = 4096
"""Rows that are rounded at a time: a table's intermediate values take several times its size."""

INT8_LINEAR = torch.ops.bwla.int8_linear.default
INT8_EMBEDDING = torch.ops.bwla.int8_embedding.default
INT4_LINEAR = torch.ops.bwla.int4_linear.default
INT4_EMBEDDING = torch.ops.bwla.int4_embedding.default


class EndLinear(nn.Module):
    """y = x' W^T + bias with W = codes * row_scale and x' = transform(x) * column_scale, in float32: heads.

    Saved: codes int8 [out, in] and row_scale [out], or, where the coding has 4 bits, codes uint8 [out, ceil(in / 2)]
    and row_scale [out, groups]; column_scale [in]; scales as int16 float16 bits with int8 exponents; bias [out] float;
    the submodule `transform`. EndLinear(in, out, ...) is empty, to be loaded.
    """

    codes: Tensor
    bias: Tensor | None
    typed: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        column_scale: bool = False,
        transform: OnlineTransform | None = None,
        coding: Coding = INT8_ROWS,
        device: Device = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.transform, self.coding = transform, coding
        _register_empty(self, out_features, in_features, device=device)
        register_empty_half(self, "column_scale", (in_features,) if column_scale else None, device=device)
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)
        register_typed(self, device=device)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        column_scale: Tensor | None = None,
        transform: OnlineTransform | None = None,
        coding: Coding = INT8_ROWS,
    ) -> Self:
        """Return the linear of weight [out, in], rounded as coding says; raises WeightError where it is not finite."""
        out, columns = weight.shape
        linear = cls(columns, out, transform=transform, coding=coding, device="meta")
        linear.codes = _rounded(linear, weight)
        register_half(linear, "column_scale", column_scale)
        linear.bias = None if bias is None else bias.detach().clone()
        register_typed(linear, device=weight.device, dtype=weight.dtype)
        return linear

    @property
    def weight(self) -> Tensor:
        """For code that asks for dtype, device or shape: [out, in] of the model's dtype, all NaN."""
        return stand_in(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], dtype of x. Raises GradientError where a gradient is asked for."""
        return _product(self, _prepared(self, x), self._buffers["bias"]).to(x.dtype)

    def dense_weight(self) -> Tensor:
        """Return W [out, in] float32, column scales and transform left out."""
        return _values(self, self.in_features)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, int{self.coding.bits}"


class EndEmbedding(nn.Module):
    """ids -> transform(codes[ids] * row_scale[ids]) * gain.

    Saved: codes and row_scale of num_embeddings rows of embedding_dim columns, as an EndLinear has them; the submodule
    `transform`; gain, a float [] where there is one, as transformers' scaled word embeddings
    have it. Results have the dtype that the module was last cast to.
    """

    codes: Tensor
    gain: Tensor | None
    typed: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        transform: OnlineTransform | None = None,
        gain: bool = False,
        coding: Coding = INT8_ROWS,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.transform, self.coding = transform, coding
        self.register_buffer("gain", torch.ones((), dtype=dtype, device=device) if gain else None)
        _register_empty(self, num_embeddings, embedding_dim, device=device)
        register_typed(self, device=device, dtype=dtype)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        *,
        padding_idx: int | None = None,
        transform: OnlineTransform | None = None,
        gain: Tensor | None = None,
        coding: Coding = INT8_ROWS,
    ) -> Self:
        """Return the embedding of weight [rows, width], rounded as its coding says; results have the weight's dtype.

        gain []: what its rows are multiplied by; None for 1.
        """
        embedding = cls(*weight.shape, padding_idx=padding_idx, transform=transform, coding=coding, device="meta")
        embedding.codes = _rounded(embedding, weight)
        embedding.gain = None if gain is None else gain.detach().clone()
        register_typed(embedding, device=weight.device, dtype=weight.dtype)
        return embedding

    @property
    def weight(self) -> Tensor:
        """For code that asks for dtype, device or shape: [rows, width] of the model's dtype, all NaN."""
        return stand_in(self)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] integer -> [..., embedding_dim]."""
        transform = self._modules.get("transform")
        b, dtype = self._buffers, self.typed.dtype
        inner = dtype if transform is None else torch.float32
        scale = b["row_scale"], b["row_scale_exponent"]
        y: Tensor
        if self.coding.bits == 8:
            y = INT8_EMBEDDING(ids, b["codes"], scale[0], inner, scale[1])
        else:
            y = INT4_EMBEDDING(ids, b["codes"], scale[0], self.embedding_dim, self.coding.group_size, inner, scale[1])
        y = y if transform is None else transform(y).to(dtype)
        return y if b["gain"] is None else y * b["gain"].to(dtype)

    def dense_weight(self) -> Tensor:
        """Return the rows [num_embeddings, embedding_dim] float32, transform and gain left out."""
        return _values(self, self.embedding_dim)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, int{self.coding.bits}{padding}"


class TiedHead(nn.Module):
    """A head that reads the codes of an embedding: y = (transform(x) * column_scale) (codes * row_scale)^T + bias.

    The embedding is referred to, not owned: it is no submodule, and the head saves its own parts alone. A deep copy
    or a pickle of a model that holds both keeps them tied.
    """

    bias: Tensor | None

    def __init__(
        self,
        embedding: EndEmbedding,
        *,
        transform: OnlineTransform | None = None,
        column_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._tied = (embedding,)  # a tuple hides it from nn.Module's registration
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.transform = transform
        register_half(self, "column_scale", column_scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def embedding(self) -> EndEmbedding:
        """The embedding whose codes this head reads."""
        return self._tied[0]

    @property
    def weight(self) -> Tensor:
        """The embedding's stand-in for code that asks for dtype or shape."""
        return self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], dtype of x. Raises GradientError where a gradient is asked for."""
        return _product(self._tied[0], _prepared(self, x), self._buffers["bias"]).to(x.dtype)

    def dense_weight(self) -> Tensor:
        """Return the embedding's rows."""
        return self.embedding.dense_weight()

    def extra_repr(self) -> str:
        bits = self.embedding.coding.bits
        return f"in={self.in_features}, out={self.out_features}, int{bits} codes of the embedding"


def int8_step(x: Tensor, dim: int) -> Tensor:
    """Return max |x| / 127 along dim, kept; 1 where that is zero."""
    scale = x.abs().amax(dim, keepdim=True) / INT8_LIMIT
    return torch.where(scale > 0, scale, 1.0)


def _register_empty(module: EndLinear | EndEmbedding, rows: int, width: int, *, device: Device) -> None:
    """Add zeroed codes and scales of a table [rows, width]."""
    coding = module.coding
    dtype = torch.int8 if coding.bits == 8 else torch.uint8
    module.register_buffer("codes", torch.zeros(rows, coding.code_bytes(width), dtype=dtype, device=device))
    shape = (rows, coding.scales(width)) if coding.group_size else (rows,)
    register_empty_half(module, "row_scale", shape, device=device)


def _rounded(module: EndLinear | EndEmbedding, weight: Tensor) -> Tensor:
    """Return the codes of weight [out, in]; the scales, as stored, go to the module's row_scale."""
    size, parts = module.coding.group_size, weight.detach().split(ROWS)
    found = (group_scales(w.float(), group_size=size) if size else int8_step(w.float(), 1)[:, 0] for w in parts)
    register_half(module, "row_scale", torch.cat([*found]))
    scale = read_half(module, "row_scale")
    assert scale is not None
    both = zip(parts, scale.split(ROWS), strict=True)
    if size:
        return torch.cat([nibble_codes(rows.float(), s, group_size=size) for rows, s in both])
    return torch.cat([_int8_codes(rows.float(), s) for rows, s in both])


def _int8_codes(rows: Tensor, scale: Tensor) -> Tensor:
    rounded = (rows / torch.where(scale > 0, scale, 1.0)[:, None]).round()
    return rounded.clamp(-INT8_LIMIT, INT8_LIMIT).to(torch.int8)


def _values(table: EndLinear | EndEmbedding, width: int) -> Tensor:
    """Return codes * scales [rows, width] float32."""
    scale, size = read_half(table, "row_scale"), table.coding.group_size
    assert scale is not None
    if size:
        return dequantized(table.codes, scale, columns=width, group_size=size)
    return table.codes.float() * scale[:, None]


def _product(table: EndLinear | EndEmbedding, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias [..., rows] for the weight of a table."""
    b, size = table._buffers, table.coding.group_size
    y: Tensor
    if size:
        y = INT4_LINEAR(x, b["codes"], b["row_scale"], bias, size, b["row_scale_exponent"])
    else:
        y = INT8_LINEAR(x, b["codes"], b["row_scale"], bias, b["row_scale_exponent"])
    return y


def _prepared(head: nn.Module, x: Tensor) -> Tensor:
    """Return what a head's codes are multiplied with: x itself, or transform(x) * column_scale in float32."""
    transform = head._modules.get("transform")
    inner = x if transform is None else transform(x.float())
    bits, exponent = head._buffers["column_scale"], head._buffers["column_scale_exponent"]
    if bits is None:
        return inner
    if x.device.type == "cpu":  # Inductor's loop would wake a thread of OpenMP, which then waits on the head's core
        scaled: Tensor = TRANSFORM(inner.float(), bits, None, None, exponent, None, None)
        return scaled
    column_scale = read_half(head, "column_scale")
    assert column_scale is not None
    return inner.float() * column_scale

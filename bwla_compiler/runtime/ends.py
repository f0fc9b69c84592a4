"""The int8 ends of a model: embeddings, heads, and heads that read the codes of an embedding."""

from typing import Self

import torch
from torch import Tensor, nn

from bwla_compiler.runtime.halves import read_half, register_empty_half, register_half
from bwla_compiler.runtime.online import OnlineTransform
from bwla_compiler.runtime.typed import register_typed, stand_in

Device = torch.device | str | None

INT8_LIMIT = 127

ROWS = 4096
"""Rows that are rounded at a time: a table's intermediate values take several times its size."""

INT8_LINEAR = torch.ops.bwla.int8_linear.default
INT8_EMBEDDING = torch.ops.bwla.int8_embedding.default


class Int8Linear(nn.Module):
    """y = (x' codes^T) * row_scale + bias with x' = transform(x) * column_scale, in float32: heads.

    Saved: codes int8 [out, in]; row_scale [out] and column_scale [in] as int16 float16 bits with int8 exponents;
    bias [out] float; the submodule `transform`. Int8Linear(in, out, ...) is empty, to be loaded.
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
        device: Device = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.transform = transform
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        register_empty_half(self, "row_scale", (out_features,), device=device)
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
    ) -> Self:
        """Return the linear of weight [out, in], rounded to int8 by row; raises WeightError where it is not finite."""
        out, columns = weight.shape
        linear = cls(columns, out, transform=transform, device="meta")
        linear.codes = _int8_rows(linear, weight)
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
        inner = _prepared(self, x)
        b = self._buffers
        y: Tensor = INT8_LINEAR(inner, b["codes"], b["row_scale"], b["bias"], b["row_scale_exponent"])
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, int8"


class Int8Embedding(nn.Module):
    """ids -> transform(codes[ids] * row_scale[ids]) * gain.

    Saved: codes int8 [num_embeddings, embedding_dim]; row_scale [num_embeddings] as int16 float16 bits with an int8
    exponent; the submodule `transform`; gain, a float [] where there is one, as transformers' scaled word embeddings
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
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.transform = transform
        self.register_buffer("gain", torch.ones((), dtype=dtype, device=device) if gain else None)
        self.register_buffer("codes", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device))
        register_empty_half(self, "row_scale", (num_embeddings,), device=device)
        register_typed(self, device=device, dtype=dtype)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        *,
        padding_idx: int | None = None,
        transform: OnlineTransform | None = None,
        gain: Tensor | None = None,
    ) -> Self:
        """Return the embedding of weight [rows, width], rounded to int8 by row; results have the weight's dtype.

        gain []: what its rows are multiplied by; None for 1.
        """
        embedding = cls(*weight.shape, padding_idx=padding_idx, transform=transform, device="meta")
        embedding.codes = _int8_rows(embedding, weight)
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
        y: Tensor = INT8_EMBEDDING(ids, b["codes"], b["row_scale"], inner, b["row_scale_exponent"])
        y = y if transform is None else transform(y).to(dtype)
        return y if b["gain"] is None else y * b["gain"].to(dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, int8{padding}"


class TiedHead(nn.Module):
    """A head that reads the codes of an embedding: y = ((transform(x) * column_scale) codes^T) * row_scale + bias.

    The embedding is referred to, not owned: it is no submodule, and the head saves its own parts alone. A deep copy
    or a pickle of a model that holds both keeps them tied.
    """

    bias: Tensor | None

    def __init__(
        self,
        embedding: Int8Embedding,
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
    def embedding(self) -> Int8Embedding:
        """The embedding whose codes this head reads."""
        return self._tied[0]

    @property
    def weight(self) -> Tensor:
        """The embedding's stand-in for code that asks for dtype or shape."""
        return self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], dtype of x. Raises GradientError where a gradient is asked for."""
        table = self._tied[0]._buffers
        inner = _prepared(self, x)
        bias = self._buffers["bias"]
        y: Tensor = INT8_LINEAR(inner, table["codes"], table["row_scale"], bias, table["row_scale_exponent"])
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, int8 codes of the embedding"


def int8_step(x: Tensor, dim: int) -> Tensor:
    """Return max |x| / 127 along dim, kept; 1 where that is zero."""
    scale = x.abs().amax(dim, keepdim=True) / INT8_LIMIT
    return torch.where(scale > 0, scale, 1.0)


def _int8_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """Return int8 codes of weight [out, in] by row; the scales, as stored, go to the module's row_scale."""
    parts = weight.detach().split(ROWS)
    register_half(module, "row_scale", torch.cat([int8_step(rows.float(), 1)[:, 0] for rows in parts]))
    scale = read_half(module, "row_scale")
    assert scale is not None
    scales = torch.where(scale > 0, scale, 1.0)[:, None].split(ROWS)
    rounded = ((rows.float() / s).round() for rows, s in zip(parts, scales, strict=True))
    return torch.cat([x.clamp(-INT8_LIMIT, INT8_LIMIT).to(torch.int8) for x in rounded])


def _prepared(head: nn.Module, x: Tensor) -> Tensor:
    """Return what a head's codes are multiplied with: x itself, or transform(x) * column_scale in float32."""
    transform = head._modules.get("transform")
    inner = x if transform is None else transform(x.float())
    if head._buffers["column_scale"] is None:
        return inner
    column_scale = read_half(head, "column_scale")
    assert column_scale is not None
    return inner.float() * column_scale

"""Operations of the normal form by what they do to an axis' basis. Data only; the rules are in `basis`."""

import operator
from collections.abc import Iterable
from typing import Any

import torch

aten = torch.ops.aten


def _overloads(names: Iterable[str]) -> frozenset[Any]:
    """Return the ATen overloads that this torch has of names like "view.default"."""
    found = set()
    for name in names:
        packet, overload = name.split(".")
        if hasattr(aten, packet) and hasattr(getattr(aten, packet), overload):
            found.add(getattr(getattr(aten, packet), overload))
    return frozenset(found)


SAME = _overloads(
    (
        "to.dtype",
        "to.device",
        "to.dtype_layout",
        "_to_copy.default",
        "clone.default",
        "alias.default",
        "dropout.default",
        "contiguous.default",
        "detach.default",
        "lift_fresh_copy.default",
        "type_as.default",
    )
)
"""Element for element the same values."""

VIEW = _overloads(("view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints"))
PERMUTE = _overloads(("transpose.int", "permute.default", "t.default"))
UNSQUEEZE = _overloads(("unsqueeze.default",))
SQUEEZE = _overloads(("squeeze.default", "squeeze.dim", "squeeze.dims"))
EXPAND = _overloads(("expand.default", "broadcast_to.default"))
COPY = _overloads(("copy.default",))
REPEAT = _overloads(("repeat.default",))
INTERLEAVE = _overloads(("repeat_interleave.self_int",))
SLICE = _overloads(("slice.Tensor",))
SELECT = _overloads(("select.int",))
SPLIT = _overloads(("split.Tensor", "split_with_sizes.default", "chunk.default"))
UNBIND = _overloads(("unbind.int",))
CAT = _overloads(("cat.default", "concat.default", "concatenate.default"))
STACK = _overloads(("stack.default",))
PAD = _overloads(("pad.default", "constant_pad_nd.default"))
SLICE_SCATTER = _overloads(("slice_scatter.default",))
SELECT_SCATTER = _overloads(("select_scatter.default",))
NEGATION = _overloads(("neg.default",))
SUM = _overloads(("add.Tensor", "sub.Tensor", "add.Scalar", "sub.Scalar", "rsub.Scalar", "rsub.Tensor"))
REVERSED = _overloads(("rsub.Scalar", "rsub.Tensor"))
PRODUCT = _overloads(("mul.Tensor", "div.Tensor", "mul.Scalar", "div.Scalar", "multiply.Tensor"))
DIVISION = _overloads(("div.Tensor", "div.Scalar"))
REDUCTION = _overloads(("mean.dim", "sum.dim_IntList"))
LENGTH = _overloads(("linalg_vector_norm.default", "norm.ScalarOpt_dim"))
"""The length of a vector: no rotation changes it."""

VARIANCE = _overloads(("var.dim", "var.correction", "std.dim", "std.correction"))
POWER = _overloads(("pow.Tensor_Scalar", "square.default"))
LINEAR = _overloads(("linear.default",))
ADDMM = _overloads(("addmm.default",))
BADDBMM = _overloads(("baddbmm.default",))
EINSUM = _overloads(("einsum.default",))
MATMUL = _overloads(("matmul.default", "mm.default", "bmm.default"))
GROUPED = frozenset({"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"})
"""x [tokens, in] sorted by expert, weights [experts, in, out], the experts' last rows [experts]. By name: transformers
registers its operator only when a model with experts is imported."""

EMBEDDING = _overloads(("embedding.default",))
LAYER_NORM = _overloads(("layer_norm.default",))
RMS_NORM = _overloads(("rms_norm.default",))
ATTENTION = _overloads(("scaled_dot_product_attention.default",))
INDEX = _overloads(("index.Tensor",))
INDEX_SELECT = _overloads(("index_select.default",))
ALONG = _overloads(("cumsum.default", "flip.default", "roll.default"))
"""Linear, and mixes or reorders the entries of the axes that are named, no others."""

TRIANGLE = _overloads(("tril.default", "triu.default"))
MASKED_FILL = _overloads(("masked_fill.Scalar", "masked_fill.Tensor"))
WHERE = _overloads(("where.self", "where.ScalarSelf", "where.ScalarOther"))
EMPTY = _overloads(("empty_like.default", "new_empty.default"))
ZEROS = _overloads(("zeros_like.default", "new_zeros.default"))
FILL = EMPTY | ZEROS | _overloads(("ones_like.default", "new_ones.default", "full_like.default", "new_full.default"))
"""Read the shape of a tensor alone."""

SHAPE_ONLY = _overloads(("sym_size.int",))
GETITEM = frozenset({operator.getitem})

POINTWISE = _overloads(
    (
        *(
            f"{name}.default"
            for name in (
                *("silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "mish", "hardswish", "hardsigmoid", "hardtanh"),
                *("tanh", "sigmoid", "softplus", "log_sigmoid", "exp", "expm1", "exp2", "log", "log1p", "erf"),
                *("cos", "sin", "sqrt", "rsqrt", "reciprocal", "abs", "sign", "round", "floor", "ceil", "trunc"),
                *("clamp", "clamp_min", "clamp_max", "maximum", "minimum", "floor_divide", "isinf", "isnan"),
                *("logical_not", "logical_and", "logical_or", "bitwise_not"),
            )
        ),
        *(f"{name}.{kind}" for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Scalar", "Tensor")),
        *(f"{name}.{kind}" for name in ("__and__", "__or__", "remainder", "fmod") for kind in ("Scalar", "Tensor")),
        *(f"{name}.{kind}" for name in ("bitwise_and", "bitwise_or") for kind in ("Scalar", "Tensor")),
        *("clamp.Tensor", "max.other", "min.other", "floor_divide.Scalar", "div.Tensor_mode", "pow.Scalar"),
        *("pow.Tensor_Tensor", "remainder.Scalar_Tensor"),
    )
)
SOFTMAX = _overloads(("softmax.int", "_softmax.default", "log_softmax.int", "logsumexp.default"))
CHOICE = _overloads(
    (
        *(f"{name}.default" for name in ("topk", "sort", "gather", "histc", "bincount", "argmax", "argmin")),
        *("max.default", "min.default", "max.dim", "min.dim", "amax.default", "amin.default", "index_put.default"),
        *("scatter.src", "scatter.value", "scatter_add.default", "one_hot.default"),
    )
)
CONVOLUTION = _overloads(("conv1d.default", "conv1d.padding", "conv2d.default", "convolution.default"))
PAIRS = _overloads(("view_as_complex.default", "view_as_real.default"))

PINNING: tuple[tuple[frozenset[Any], str], ...] = (
    (POINTWISE, "acts on each channel by itself"),
    (SOFTMAX, "acts on each channel by itself"),
    (CHOICE, "chooses by value or by number"),
    (CONVOLUTION, "convolves channel by channel"),
    (PAIRS, "takes channels in pairs"),
)
"""Kinds that only the identity commutes with, and why."""

LAYOUT = SAME | VIEW | PERMUTE | UNSQUEEZE
"""What may stand between a parameter and its use without changing its numbers."""

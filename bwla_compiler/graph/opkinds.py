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

NEGATION = _overloads(("neg.default",))
VIEW = _overloads(("view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints"))
PERMUTE = _overloads(("transpose.int", "permute.default", "t.default"))
UNSQUEEZE = _overloads(("unsqueeze.default",))
EXPAND = _overloads(("expand.default", "broadcast_to.default"))
SLICE = _overloads(("slice.Tensor",))
SPLIT = _overloads(("split.Tensor", "split_with_sizes.default", "chunk.default"))
CAT = _overloads(("cat.default",))
SUM = _overloads(("add.Tensor", "sub.Tensor", "add.Scalar", "sub.Scalar"))
PRODUCT = _overloads(("mul.Tensor", "div.Tensor", "mul.Scalar", "div.Scalar"))
DIVISION = _overloads(("div.Tensor", "div.Scalar"))
REDUCTION = _overloads(("mean.dim", "sum.dim_IntList"))
POWER = _overloads(("pow.Tensor_Scalar", "square.default"))
LINEAR = _overloads(("linear.default",))
ADDMM = _overloads(("addmm.default",))
MATMUL = _overloads(("matmul.default", "mm.default", "bmm.default"))
GROUPED = frozenset({"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"})
"""x [tokens, in] sorted by expert, weights [experts, in, out], the experts' last rows [experts]. By name: transformers
registers its operator only when a model with experts is imported."""

EMBEDDING = _overloads(("embedding.default",))
LAYER_NORM = _overloads(("layer_norm.default",))
RMS_NORM = _overloads(("rms_norm.default",))
ATTENTION = _overloads(("scaled_dot_product_attention.default",))
INDEX = _overloads(("index.Tensor",))
MASKED_FILL = _overloads(("masked_fill.Scalar",))
SHAPE_ONLY = _overloads(("sym_size.int", "empty_like.default"))
GETITEM = frozenset({operator.getitem})

NONLINEAR = _overloads(
    (
        "silu.default",
        "gelu.default",
        "relu.default",
        "tanh.default",
        "sigmoid.default",
        "exp.default",
        "cos.default",
        "sin.default",
        "rsqrt.default",
        "softmax.int",
        "_softmax.default",
        "where.self",
    )
)
"""Act on each channel by itself (or, softmax, on one axis in its own basis): the identity alone commutes."""

LAYOUT = SAME | VIEW | PERMUTE | UNSQUEEZE
"""What may stand between a parameter and its use without changing its numbers."""

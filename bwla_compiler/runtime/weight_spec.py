"""The LinearSpec of a weight that is to be packed, and the refusal of what no kernel takes."""

from typing import Literal

from bwla_compiler.errors import ShapeError
from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.runtime.portable import GROUP
from bwla_compiler.spec import LinearSpec, TransformSpec


def scale_kind(*, groups: int, columns: bool) -> Literal["row", "row+column", "group"]:
    """Return the kind of scales: so many groups of columns in a row, with or without a scale of each column."""
    if groups > 1:
        return "group"
    return "row+column" if columns else "row"


def spec_of_weight(
    weight: BinaryWeight, *, transform: TransformSpec | None, activation_bits: int, bias: bool = False
) -> LinearSpec:
    """Return the shape and format of a weight in the basis that a transform leads to.

    Raises ShapeError for groups other than of 128 columns, or for group and column scales together.
    """
    groups, columns = weight.scale.shape[2], weight.column_scale is not None
    if groups > 1 and (weight.columns_per_scale() != GROUP or columns):
        raise ShapeError(
            f"{groups} groups of {weight.columns_per_scale()} columns{' and a column scale' if columns else ''}: "
            f"kernels take one scale a row (and column scales), or groups of {GROUP} columns without column scales"
        )
    return LinearSpec(
        in_features=weight.in_features,
        out_features=(weight.out_features,),
        planes=weight.planes,
        scale_kind=scale_kind(groups=groups, columns=columns),
        group_size=GROUP,
        rank=weight.rank,
        transform=transform or TransformSpec(),
        activation_bits=activation_bits,
        bias=bias,
    )

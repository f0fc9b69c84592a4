"""Apply edits to an nn.Module, in place. The only code of the passes that changes a model."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bwla_compiler.errors import WeightError
from bwla_compiler.graph.plan import Expression
from bwla_compiler.passes.base import (
    DropGain,
    Edit,
    InsertTransform,
    ReplaceModule,
    RotateParameter,
    ScaleParameter,
    ShiftBias,
    Untie,
)
from bwla_compiler.runtime.experts import PackedExperts, TransformedExperts, adopt
from bwla_compiler.runtime.modules import OnlineTransform
from bwla_compiler.runtime.transformed import TransformedLinear


def apply_module(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Perform edits in order. Arithmetic is in float64; parameters keep their dtype."""
    with torch.no_grad():
        for edit in edits:
            _apply(model, edit)


def _apply(model: nn.Module, edit: Edit) -> None:
    match edit:
        case Untie():
            _untie(model, edit)
        case ScaleParameter():
            factor = edit.factor.to(torch.float64)
            _in_parts(model.get_parameter(edit.parameter), edit.axis, lambda part: part * factor)
        case ShiftBias():
            _shift_bias(model, edit)
        case DropGain():
            model.get_parameter(edit.parameter).fill_(edit.value)
        case RotateParameter():
            rotated = partial(_rotate_last, expression=edit.expression, rotations=edit.rotations)
            _in_parts(model.get_parameter(edit.parameter), edit.axis, rotated)
        case InsertTransform():
            for name, in_axis in edit.linears:
                transform = OnlineTransform.from_factors(edit.scale, edit.left, edit.right, kind=edit.kind)
                replace_module(model, name, _transformed(model, name, transform, in_axis))
        case ReplaceModule():
            replace_module(model, edit.name, edit.module)


PART = 1 << 24
"""Numbers of a parameter that are worked on at a time, in float64: the largest tables would take several times 8 GB."""


def _in_parts(parameter: Tensor, axis: int, function: Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter, in place, by function(its values in float64, `axis` last), part by part."""
    moved = parameter.movedim(axis, -1)
    if moved.ndim == 1:
        moved.copy_(function(moved.to(torch.float64)))
        return
    step = max(1, PART // moved[0].numel())
    for part in moved.split(step):
        part.copy_(function(part.to(torch.float64)))


def _transformed(model: nn.Module, name: str, transform: OnlineTransform, in_axis: int) -> nn.Module:
    """Return what takes the place of a linear, or of a parameter of experts, behind a transform."""
    owner, _, leaf = name.rpartition(".")
    parameter = model.get_submodule(owner)._parameters.get(leaf)
    if parameter is not None:
        return TransformedExperts(transform, parameter, in_axis=in_axis)
    return TransformedLinear(transform, model.get_submodule(name), in_axis=in_axis)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name, where a module was or, for experts, a parameter of three axes."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    owner._parameters.pop(child, None)  # torch puts no module where a parameter is
    setattr(owner, child, module)
    if isinstance(module, (PackedExperts, TransformedExperts)):
        adopt(owner)


def rotate_axis(tensor: Tensor, axis: int, expression: Expression, rotations: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor multiplied along one axis by its basis' matrix, T[.., i, ..] -> sum_j R[i, j] T[.., j, ..].

    tensor: float64, any shape, the axis of size expression.size. rotations [n, n] by basis name; leaves
    without one stay. Products and sums are worked part by part: no Kronecker matrix is ever formed.
    """
    moved = tensor.movedim(axis, -1)
    return _rotate_last(moved, expression, rotations).movedim(-1, axis)


def _rotate_last(tensor: Tensor, expression: Expression, rotations: Mapping[str, Tensor]) -> Tensor:
    if expression.kind == "leaf":
        matrix = rotations.get(expression.basis)
        return tensor if matrix is None else tensor @ matrix.to(tensor.device, tensor.dtype).T
    sizes = [part.size for part in expression.parts]
    if expression.kind == "sum":
        pieces = zip(tensor.split(sizes, -1), expression.parts, strict=True)
        return torch.cat([_rotate_last(piece, part, rotations) for piece, part in pieces], -1)
    split = tensor.reshape(*tensor.shape[:-1], *sizes)
    first = tensor.ndim - 1
    for i, part in enumerate(expression.parts):
        split = rotate_axis(split, first + i, part, rotations)
    return split.reshape(tensor.shape)


def _untie(model: nn.Module, edit: Untie) -> None:
    weight = model.get_parameter(edit.embedding)
    head = model.get_submodule(edit.head)
    head.register_parameter("weight", nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    config = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = False


def _shift_bias(model: nn.Module, edit: ShiftBias) -> None:
    linear = model.get_submodule(edit.linear)
    weight = linear.get_parameter("weight").to(torch.float64)
    added = edit.shift.to(torch.float64) @ weight.movedim(edit.in_axis, 0)
    bias = getattr(linear, "bias", None)
    if bias is None:
        linear.register_parameter("bias", nn.Parameter(added.to(linear.get_parameter("weight").dtype)))
    else:
        bias.copy_(bias.to(torch.float64) + added)


def check_weights(model: nn.Module) -> None:
    """Raise WeightError, naming the parameter, where a weight is not finite, not floating, or on no device."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise WeightError(f"{name} has no values (meta device): load the model with its weights")
        if not parameter.is_floating_point():
            raise WeightError(f"{name} is {parameter.dtype}: only floating-point weights can be quantized")
        if parameter.numel() and not parameter.untyped_storage().nbytes():
            raise WeightError(f"{name} was released by free_weights=True: load the model anew")
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise WeightError(
                f"{name} holds {bad} NaN or infinite values of {parameter.numel()}: the checkpoint is damaged "
                "or overflowed its dtype; reload it, or load it with dtype=float32"
            )

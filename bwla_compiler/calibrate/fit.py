"""The fit of one group: statistics and float weights in, binary planes and low-rank pairs out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bwla_compiler.numerics.feedback import gptq_signs
from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.numerics.psp import hessian_error, split_group
from bwla_compiler.numerics.signs import descend_signs, round_signs
from bwla_compiler.numerics.stats import damped
from bwla_compiler.numerics.target import drift_corrected
from bwla_compiler.recipe import Recipe


@dataclass(frozen=True)
class LinearFit:
    """Planes and errors (see `report.LinearReport` for their meaning)."""

    weight: BinaryWeight
    weight_error: float
    output_error: float


def fit_group(
    weights: Sequence[Tensor], *, gram: Tensor | None, cross: Tensor | None, recipe: Recipe, rank: int
) -> list[LinearFit]:
    """Return the binary forms of weights [out_i, in] float32 that read one input.

    gram [in, in]: mean x^T x of the (rounded) inputs, None without calibration (then the identity stands for
    it). cross [sum of out_i, in]: mean drift^T x, None where the target is the weight itself. rank: of each
    weight's low-rank pair.
    """
    rows = [w.shape[0] for w in weights]
    stacked = torch.cat(list(weights))
    if gram is not None and cross is not None and recipe.target.drift:
        stacked = drift_corrected(stacked, gram, cross, damping=recipe.target.damping)
    targets = stacked.split(rows)
    hessian = torch.eye(stacked.shape[1]) if gram is None else damped(gram, recipe.signs.damping).float()
    fitted = _first_planes(targets, hessian, recipe, rank)
    for _ in range(recipe.weights.planes - 1):
        fitted = _next_planes(targets, hessian, recipe, fitted)
    return [_with_errors(target, weight, hessian) for target, weight in zip(targets, fitted, strict=True)]


def _with_errors(target: Tensor, weight: BinaryWeight, hessian: Tensor) -> LinearFit:
    error = target - weight.dense()
    return LinearFit(
        weight,
        weight_error=float(error.square().sum() / target.square().sum()),
        output_error=hessian_error(error, hessian) / max(hessian_error(target, hessian), 1e-30),
    )


def _signs(targets: Sequence[Tensor], hessian: Tensor, recipe: Recipe) -> list[tuple[Tensor, Tensor]]:
    """Return (signs, scale) of each target; rows are independent, so they are chosen together."""
    stacked = torch.cat(list(targets))
    if recipe.signs.method == "round":
        signs, scale = round_signs(stacked)
    elif recipe.signs.method == "gptq":
        signs, scale = descend_signs(stacked, hessian, signs=gptq_signs(stacked, hessian), sweeps=0)
    else:
        signs, scale = descend_signs(stacked, hessian, sweeps=recipe.signs.sweeps)
    rows = [t.shape[0] for t in targets]
    return list(zip(signs.split(rows), scale.split(rows), strict=True))


def _first_planes(targets: Sequence[Tensor], hessian: Tensor, recipe: Recipe, rank: int) -> list[BinaryWeight]:
    if rank == 0 or recipe.signs.method != "descent":
        return [BinaryWeight(b[None], a[None]) for b, a in _signs(targets, hessian, recipe)]
    splits = split_group(targets, hessian, rank=rank, sweeps=recipe.signs.sweeps, iterations=recipe.psp.iterations)
    return [
        BinaryWeight(s.signs[None], s.scale[None], low_rank_out=s.low_rank_out, low_rank_in=s.low_rank_in)
        for s in splits
    ]


def _next_planes(
    targets: Sequence[Tensor], hessian: Tensor, recipe: Recipe, fitted: Sequence[BinaryWeight]
) -> list[BinaryWeight]:
    """Add a plane that binarises what the planes so far leave (the residual of BiLLM, 2402.04291, section 3.2)."""
    rests = [target - weight.dense() for target, weight in zip(targets, fitted, strict=True)]
    return [
        replace(weight, signs=torch.cat([weight.signs, b[None]]), scale=torch.cat([weight.scale, a[None]]))
        for weight, (b, a) in zip(fitted, _signs(rests, hessian, recipe), strict=True)
    ]

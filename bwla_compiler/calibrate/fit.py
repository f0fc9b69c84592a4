"""The fit of one linear: statistics and a float weight in, binary planes and a low-rank pair out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bwla_compiler.numerics.feedback import gptq_signs
from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.numerics.psp import hessian_error, split_low_rank
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


def fit_linear(weight: Tensor, *, gram: Tensor | None, cross: Tensor | None, recipe: Recipe, rank: int) -> LinearFit:
    """Return the binary form of a weight [out, in] float32.

    gram [in, in]: mean x^T x of the (rounded) inputs, None without calibration (then the identity stands for
    it). cross [out, in]: mean drift^T x, None where the target is the weight itself. rank: of the low-rank pair.
    """
    target = weight
    if gram is not None and cross is not None and recipe.target.drift:
        target = drift_corrected(weight, gram, cross, damping=recipe.target.damping)
    n = weight.shape[1]
    hessian = torch.eye(n) if gram is None else damped(gram, recipe.signs.damping).float()
    fitted = _first_plane(target, hessian, recipe, rank)
    for _ in range(recipe.weights.planes - 1):
        fitted = _next_plane(target, hessian, recipe, fitted)
    error = target - fitted.dense()
    return LinearFit(
        fitted,
        weight_error=float(error.square().sum() / target.square().sum()),
        output_error=hessian_error(error, hessian) / max(hessian_error(target, hessian), 1e-30),
    )


def _signs(target: Tensor, hessian: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    if recipe.signs.method == "round":
        return round_signs(target)
    if recipe.signs.method == "gptq":
        return descend_signs(target, hessian, signs=gptq_signs(target, hessian), sweeps=0)
    return descend_signs(target, hessian, sweeps=recipe.signs.sweeps)


def _first_plane(target: Tensor, hessian: Tensor, recipe: Recipe, rank: int) -> BinaryWeight:
    if rank == 0 or recipe.signs.method != "descent":
        signs, scale = _signs(target, hessian, recipe)
        return BinaryWeight(signs[None], scale[None])
    split = split_low_rank(target, hessian, rank=rank, sweeps=recipe.signs.sweeps, iterations=recipe.psp.iterations)
    return BinaryWeight(
        split.signs[None], split.scale[None], low_rank_out=split.low_rank_out, low_rank_in=split.low_rank_in
    )


def _next_plane(target: Tensor, hessian: Tensor, recipe: Recipe, fitted: BinaryWeight) -> BinaryWeight:
    """Add a plane that binarises what the planes so far leave (the residual of BiLLM, 2402.04291, section 3.2)."""
    signs, scale = _signs(target - fitted.dense(), hessian, recipe)
    return BinaryWeight(
        torch.cat([fitted.signs, signs[None]]),
        torch.cat([fitted.scale, scale[None]]),
        low_rank_out=fitted.low_rank_out,
        low_rank_in=fitted.low_rank_in,
    )

"""The fit of one group: statistics and float weights in, binary planes and low-rank pairs out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bwla_compiler.graph.plan import Linear
from bwla_compiler.numerics.billm import billm_bits, billm_weight
from bwla_compiler.numerics.group_signs import descend_groups, round_groups
from bwla_compiler.numerics.paper import split_as_paper
from bwla_compiler.numerics.planes import BinaryWeight, SimulatedWeight
from bwla_compiler.numerics.psp import hessian_error, split_group
from bwla_compiler.numerics.row_column import round_rows_columns
from bwla_compiler.numerics.signs import descend_signs, round_signs
from bwla_compiler.numerics.stats import damped
from bwla_compiler.numerics.target import drift_corrected
from bwla_compiler.recipe import DATA_FREE, Recipe

GROUP = 128
"""Columns that share a scale where a recipe asks for groups: what the kernels take."""


@dataclass(frozen=True)
class LinearFit:
    """Planes and errors (see `report.LinearReport` for their meaning)."""

    weight: BinaryWeight | SimulatedWeight
    weight_error: float
    output_error: float


def rank_of(recipe: Recipe, linear: Linear, *, hidden: int) -> int:
    """Return the rank of a linear's pair in a model of a hidden size."""
    if linear.experts:  # narrow and many: a pair as wide as the model's would outweigh them
        hidden = min(hidden, linear.in_features, linear.out_features)
    return recipe.psp.rank_for(linear.in_features, linear.out_features, hidden=hidden)


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
    # rounding reads none, and the identity of a wide input takes more memory than its weights
    columns = 0 if recipe.signs.method in DATA_FREE else stacked.shape[1]
    hessian = torch.eye(columns) if gram is None else damped(gram, recipe.signs.damping).float()
    fitted = _weights(targets, hessian, recipe, rank)
    seen = None if gram is None else hessian
    return [_with_errors(target, weight, seen) for target, weight in zip(targets, fitted, strict=True)]


def _weights(
    targets: Sequence[Tensor], hessian: Tensor, recipe: Recipe, rank: int
) -> Sequence[BinaryWeight | SimulatedWeight]:
    if recipe.signs.method == "paper":
        return [_as_paper(target, recipe, rank) for target in targets]
    if recipe.simulated:
        return [_simulated(target, hessian, refined=recipe.signs.method == "arb") for target in targets]
    fitted = _first_planes(targets, hessian, recipe, rank)
    for _ in range(recipe.weights.n_planes - 1):
        fitted = _next_planes(targets, hessian, recipe, fitted)
    return fitted


def _as_paper(target: Tensor, recipe: Recipe, rank: int) -> BinaryWeight:
    generator = torch.Generator().manual_seed(0)  # the Gaussian start only has to be generic
    found = split_as_paper(target, rank=rank, generator=generator, iterations=recipe.psp.iterations)
    return BinaryWeight(
        found.signs[None],
        found.row_scale[None],
        column_scale=found.column_scale,
        low_rank_out=found.low_rank_out,
        low_rank_in=found.low_rank_in,
    )


def _simulated(target: Tensor, hessian: Tensor, *, refined: bool) -> SimulatedWeight:
    dense = billm_weight(target, hessian, refined=refined)
    return SimulatedWeight(dense, n_bits=billm_bits(*target.shape, refined=refined))


def _with_errors(target: Tensor, weight: BinaryWeight | SimulatedWeight, hessian: Tensor | None) -> LinearFit:
    """Return a fit with its errors; without a hessian, inputs count alike and both errors are the weight's."""
    error = target - weight.dense()
    of_weight = float(error.square().sum() / target.square().sum())
    if hessian is None:
        return LinearFit(weight, of_weight, of_weight)
    of_output = hessian_error(error, hessian) / max(hessian_error(target, hessian), 1e-30)
    return LinearFit(weight, of_weight, of_output)


def _signs(targets: Sequence[Tensor], hessian: Tensor, recipe: Recipe) -> list[tuple[Tensor, Tensor]]:
    """Return (signs, scale [m, groups]) of each target; rows are independent, so they are chosen together."""
    stacked = torch.cat(list(targets))
    grouped, method = recipe.weights.scales == "group", recipe.signs.method
    sweeps = recipe.signs.sweeps if method == "descent" else 0
    if method == "round":
        signs, scale = round_groups(stacked, group=GROUP) if grouped else round_signs(stacked)
    elif grouped:
        signs, scale = descend_groups(stacked, hessian, group=GROUP, sweeps=sweeps)
    else:
        signs, scale = descend_signs(stacked, hessian, sweeps=sweeps)
    rows = [t.shape[0] for t in targets]
    return list(zip(signs.split(rows), scale.split(rows), strict=True))


def _first_planes(targets: Sequence[Tensor], hessian: Tensor, recipe: Recipe, rank: int) -> list[BinaryWeight]:
    if recipe.weights.scales == "row+column":
        parts = (round_rows_columns(target) for target in targets)
        return [BinaryWeight(signs[None], row[None], column_scale=column) for signs, row, column in parts]
    if rank == 0 or recipe.signs.method != "descent":
        size = GROUP if recipe.weights.scales == "group" else 0
        return [BinaryWeight(b[None], a[None], group_size=size) for b, a in _signs(targets, hessian, recipe)]
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

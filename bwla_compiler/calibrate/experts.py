"""The fit of experts: statistics by expert from the rows that the quantized stream sends to it, with a floor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bwla_compiler.calibrate.fit import LinearFit, fit_group
from bwla_compiler.calibrate.report import ExpertTokens
from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.numerics.stats import LinearStats
from bwla_compiler.recipe import Recipe


@dataclass(frozen=True)
class ExpertsFit:
    """The binary weights of one parameter of experts, one each; errors and tokens as `report.LinearReport` has them."""

    weight: tuple[BinaryWeight, ...]
    weight_error: float
    output_error: float
    tokens: ExpertTokens | None


@dataclass(frozen=True)
class Rows:
    """Rows of one batch: x [N, in] float32 as the experts will see them, each row's expert [N], and its drift.

    drift [N, in]: the fp stream's row of the same token and expert less x, 0 where the fp stream has none; None where
    no drift is asked for. alike [N]: whether it has one.
    """

    x: Tensor
    expert: Tensor
    drift: Tensor | None
    alike: Tensor


@dataclass(frozen=True)
class _Moments:
    """gram [in, in]: mean x^T x; drift [in, in] or None: mean drift^T x; over n_tokens."""

    n_tokens: int
    gram: Tensor
    drift: Tensor | None


def matched(x: Tensor, keys: Tensor, other: Tensor, other_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows of `other` by the keys of x, 0 where it has none; whether it has one): x [N, n], other [M, n].

    keys [N], other_keys [M] are integers; those of `other` differ.
    """
    if other_keys.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(keys, dtype=torch.bool)
    ordered, order = torch.sort(other_keys)
    place = torch.searchsorted(ordered, keys).clamp_max(ordered.numel() - 1)
    found = ordered[place] == keys
    return torch.where(found[:, None], other[order[place]], 0.0), found


def fit_experts(
    weights: Sequence[Tensor], rows: Sequence[Rows] | None, *, recipe: Recipe, rank: int
) -> list[ExpertsFit]:
    """Return the fits of weights [E, out_i, in] float that read one input; rows: by batch, None without calibration.

    An expert with n tokens fewer than recipe.calibration.expert_tokens (f) is fitted to n/f of its own moments and
    1 - n/f of those of all rows; one without a token to the latter alone.
    """
    n_experts = weights[0].shape[0]
    floor = recipe.calibration.expert_tokens
    shared = None if rows is None else _moments((r.x, r.drift) for r in rows)
    found: list[list[LinearFit]] = [[] for _ in weights]
    counts = []
    for expert in range(n_experts):
        moments = None if rows is None or shared is None else _blended(_own(rows, expert), shared, floor)
        counts.append(0 if moments is None else moments.n_tokens)
        own = [w[expert].float() for w in weights]
        for fits, fit in zip(found, _fit(own, moments, recipe, rank), strict=True):
            fits.append(fit)
    tokens = None if rows is None else _tokens(rows, counts, floor)
    return [_together(fits, counts, tokens) for fits in found]


def _fit(weights: list[Tensor], moments: _Moments | None, recipe: Recipe, rank: int) -> list[LinearFit]:
    if moments is None:
        return fit_group(weights, gram=None, cross=None, recipe=recipe, rank=rank)
    cross = None if moments.drift is None else (torch.cat(weights).double() @ moments.drift).float()
    return fit_group(weights, gram=moments.gram, cross=cross, recipe=recipe, rank=rank)


def _own(rows: Sequence[Rows], expert: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the rows of one expert, batch by batch, and their drifts."""
    for batch in rows:
        mine = (batch.expert == expert).nonzero()[:, 0]
        if mine.numel():
            yield batch.x[mine], None if batch.drift is None else batch.drift[mine]


def _moments(parts: Iterator[tuple[Tensor, Tensor | None]]) -> _Moments | None:
    """Return the moments of rows; None where there are none."""
    stats: LinearStats | None = None
    for x, drift in parts:
        if stats is None:
            stats = LinearStats.empty(x.shape[1], None if drift is None else x.shape[1])
        stats.update(x, drift)
    if stats is None or stats.n_tokens == 0:
        return None
    return _Moments(stats.n_tokens, stats.gram(), None if stats.cross_sum is None else stats.cross())


def _blended(parts: Iterator[tuple[Tensor, Tensor | None]], shared: _Moments, floor: int) -> _Moments:
    """Return one expert's moments, those of all rows standing for the tokens that it lacks; n_tokens are its own."""
    own = _moments(parts)
    if own is None:
        return _Moments(0, shared.gram, shared.drift)
    if own.n_tokens >= floor:
        return own
    share = own.n_tokens / floor
    drift = None
    if own.drift is not None and shared.drift is not None:
        drift = share * own.drift + (1 - share) * shared.drift
    return _Moments(own.n_tokens, share * own.gram + (1 - share) * shared.gram, drift)


def _tokens(rows: Sequence[Rows], counts: Sequence[int], floor: int) -> ExpertTokens:
    alike = sum(int(r.alike.sum()) for r in rows) / max(1, sum(r.alike.numel() for r in rows))
    return ExpertTokens(tuple(counts), floor, sum(n < floor for n in counts), alike)


def _together(fits: Sequence[LinearFit], counts: Sequence[int], tokens: ExpertTokens | None) -> ExpertsFit:
    """Return one parameter's fit; errors are means over the experts by their tokens, over all alike without any."""
    shares = counts if sum(counts) else [1] * len(fits)
    total = sum(shares)
    packed = tuple(fit.weight for fit in fits if isinstance(fit.weight, BinaryWeight))
    assert len(packed) == len(fits), "experts are not simulated: quantize_model refuses that"
    return ExpertsFit(
        packed,
        weight_error=sum(n * fit.weight_error for n, fit in zip(shares, fits, strict=True)) / total,
        output_error=sum(n * fit.output_error for n, fit in zip(shares, fits, strict=True)) / total,
        tokens=tokens,
    )

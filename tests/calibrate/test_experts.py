"""Statistics by expert: rows matched between streams, the floor for rarely used experts, experts without a token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.calibrate.experts import Rows, fit_experts, matched
from bwla_compiler.calibrate.fit import fit_group
from bwla_compiler.recipe import Recipe, load_recipe

N_IN, N_OUT, FLOOR = 24, 6, 40


def recipe(**changes: object) -> Recipe:
    given = {"calibration.expert_tokens": FLOOR, "signs.sweeps": 2, "psp.iterations": 1}
    return load_recipe("bwla-w1a6", given | {k.replace("__", "."): v for k, v in changes.items()})


def weights(n_experts: int) -> torch.Tensor:
    return torch.randn(n_experts, N_OUT, N_IN, generator=torch.Generator().manual_seed(0))


def rows(counts: list[int], *, seed: int = 0) -> Rows:
    """Return rows of which each expert gets as many as told, from a distribution of its own."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for e, n in enumerate(counts):
        mix = torch.randn(N_IN, N_IN, generator=torch.Generator().manual_seed(e + 1))
        parts.append(torch.randn(n, N_IN, generator=generator) @ mix)
    x = torch.cat(parts)
    expert = torch.cat([torch.full((n,), e) for e, n in enumerate(counts)])
    drift = 0.1 * torch.randn(x.shape, generator=generator)
    return Rows(x, expert, drift, torch.ones(len(x), dtype=torch.bool))


def test_an_expert_with_enough_tokens_is_fitted_to_its_own() -> None:
    batches = [rows([30, 90], seed=1), rows([30, 90], seed=2)]
    w = weights(2)
    (fit,) = fit_experts([w], batches, recipe=recipe(), rank=2)
    assert fit.tokens is not None
    assert (fit.tokens.counts, fit.tokens.blended) == ((60, 180), 0)
    x = torch.cat([b.x[b.expert == 1] for b in batches]).double()
    drift = torch.cat([b.drift[b.expert == 1] for b in batches if b.drift is not None]).double()
    gram, cross = x.T @ x / len(x), w[1].double() @ (drift.T @ x / len(x))
    (alone,) = fit_group([w[1]], gram=gram, cross=cross.float(), recipe=recipe(), rank=2)
    # sums over batches run in another order; a sign in a thousand may fall the other way
    assert (alone.weight.signs == fit.weight[1].signs).float().mean() > 0.99
    torch.testing.assert_close(alone.weight.scale, fit.weight[1].scale, rtol=1e-2, atol=1e-3)


def test_an_expert_below_the_floor_leans_on_all_tokens() -> None:
    (fit,) = fit_experts([weights(3)], [rows([100, 10, 0])], recipe=recipe(), rank=2)
    assert fit.tokens is not None
    assert (fit.tokens.counts, fit.tokens.blended, fit.tokens.floor) == ((100, 10, 0), 2, FLOOR)
    assert "0 to 100 tokens an expert; 2 of 3 experts below 40" in str(fit.tokens)


def test_an_expert_without_a_token_is_fitted_to_all_tokens() -> None:
    w, batch = weights(2), rows([100, 0])
    (fit,) = fit_experts([w], [batch], recipe=recipe(target__drift=False), rank=2)
    x = batch.x.double()
    (alone,) = fit_group([w[1]], gram=x.T @ x / len(x), cross=None, recipe=recipe(target__drift=False), rank=2)
    assert (alone.weight.signs == fit.weight[1].signs).float().mean() > 0.99
    assert all(w.scale.isfinite().all() for w in fit.weight)


def test_its_own_tokens_serve_an_expert_better_than_all_tokens_do() -> None:
    """What the experts' own statistics are for."""
    w, batch = weights(2), rows([400, 400])

    def error(floor: int) -> float:
        (fit,) = fit_experts([w], [batch], recipe=recipe(calibration__expert_tokens=floor), rank=0)
        errors = [(w[e] - fit.weight[e].dense()) @ batch.x[batch.expert == e].T for e in range(2)]
        return sum(float(e.square().sum()) for e in errors)

    assert error(1) < 0.98 * error(10**9)  # at the latter, the blend is all tokens' to one part in 10^6


def test_without_calibration_every_expert_is_rounded_alone() -> None:
    w = weights(2)
    (fit,) = fit_experts([w], None, recipe=load_recipe("rtn"), rank=0)
    assert fit.tokens is None
    assert all(torch.equal(f.signs[0], w[e].sign().to(torch.int8)) for e, f in enumerate(fit.weight))
    torch.testing.assert_close(fit.weight[1].scale[0, :, 0], w[1].abs().mean(1))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 30), unique=True, max_size=12), st.lists(st.integers(0, 30), unique=True, max_size=12))
def test_rows_are_matched_by_key(mine: list[int], theirs: list[int]) -> None:
    keys, other_keys = (torch.tensor(k, dtype=torch.int64) for k in (mine, theirs))
    x, other = (k[:, None].float().expand(-1, 3) for k in (keys, other_keys))
    twin, found = matched(x, keys, other, other_keys)
    assert found.tolist() == [k in theirs for k in mine]
    assert torch.equal(twin, torch.where(found[:, None], x, 0.0))


def test_the_floor_is_a_field_of_the_recipe() -> None:
    assert load_recipe("bwla-w1a6").calibration.expert_tokens == 256
    with pytest.raises(ValueError, match="expert_tokens"):
        load_recipe("bwla-w1a6", {"calibration.expert_tokens": 0})

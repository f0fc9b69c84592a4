"""Each linear's own recipe: a mean of planes is met, grows with the mean, and gives way to overrides."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.errors import RecipeError
from bwla_compiler.graph.plan import Expression, Linear, Plan
from bwla_compiler.passes.own_recipes import own_recipes
from bwla_compiler.recipe import Override, Recipe, load_recipe
from tests import planned

SIZES = st.lists(st.tuples(st.integers(1, 90), st.booleans(), st.sampled_from([0, 0, 4])), min_size=1, max_size=12)
MEANS = st.floats(1, 4, allow_nan=False)
COMMON = {"decision": "online", "reason": "", "group": "", "bias": None, "in_axis": 1, "out_axis": 0}


def made(sizes: Sequence[tuple[int, bool, int]], *, blocks: bool = True) -> Plan:
    """Return a plan of linears of (columns, whether they write the residual stream, experts), each a row per column."""
    linears = [
        Linear(
            name=f"layers.{i}.x", parameter=f"layers.{i}.x.weight", in_features=n, out_features=n,
            block=f"layers.{i}" if blocks else "", input=Expression("leaf", n), output=Expression("leaf", n),
            writes_residual=writes, experts=experts, **COMMON,  # type: ignore[arg-type]
        )
        for i, (n, writes, experts) in enumerate(sizes)
    ]  # fmt: skip
    return Plan("Made", (), tuple(linears), (), (), ())


def asked(mean: float, *overrides: Override) -> Recipe:
    table = [{"pattern": o.pattern, "keep": o.keep, "set": o.set} for o in overrides]
    return load_recipe("rtn", {"weights.planes": mean, "overrides": table})


def planes(plan: Plan, recipe: Recipe) -> dict[str, int]:
    """Return the planes of each linear that is not kept."""
    return {name: own.weights.n_planes for name, own in own_recipes(plan, recipe).items() if own is not None}


def stored(plan: Plan, found: dict[str, int]) -> int:
    """Return how many signs are stored."""
    return sum(n * plan.linear(name).n_weights for name, n in found.items())


@given(SIZES, MEANS, MEANS, st.booleans())
@settings(deadline=None, max_examples=150)
def test_the_mean_is_met_within_half_a_linear_and_grows(
    sizes: list[tuple[int, bool, int]], one: float, other: float, blocks: bool
) -> None:
    plan = made(sizes, blocks=blocks)
    total = sum(x.n_weights for x in plan.linears)
    largest = max(x.n_weights for x in plan.linears)
    found = {mean: planes(plan, asked(mean)) for mean in (one, other)}
    for mean, own in found.items():
        assert set(own.values()) <= {math.floor(mean), math.ceil(mean)}
        assert abs(stored(plan, own) - mean * total) <= largest / 2 + 1e-9 * total  # rounding of the product
    low, high = sorted((one, other))
    assert stored(plan, found[low]) <= stored(plan, found[high])


@given(SIZES, MEANS, st.sampled_from([1, 2, 3, 4]))
@settings(deadline=None, max_examples=100)
def test_overrides_win_and_the_others_make_up_for_them(
    sizes: list[tuple[int, bool, int]], mean: float, given_planes: int
) -> None:
    plan = made(sizes)
    own = planes(plan, asked(mean, Override("layers.0.*", set={"weights.planes": given_planes})))
    assert own["layers.0.x"] == given_planes
    free = [x for x in plan.linears if x.name != "layers.0.x"]
    if mean == int(mean) or not free:
        assert all(own[x.name] == int(mean) for x in free)
        return
    weights = sum(x.n_weights for x in free)
    first = plan.linears[0].n_weights
    wanted = min(max((mean * (weights + first) - given_planes * first) / weights, 1), 4) * weights
    total = sum(own[x.name] * x.n_weights for x in free)
    assert abs(total - wanted) <= max(x.n_weights for x in free) / 2 + 1e-9 * wanted  # rounding of the sums


def test_writers_of_the_residual_stream_come_first_then_the_models_order() -> None:
    plan = made([(4, False, 0), (4, True, 0), (4, False, 0), (4, True, 0)])
    assert list(planes(plan, asked(1.75)).values()) == [2, 2, 1, 2]
    assert list(planes(plan, asked(2.25)).values()) == [2, 3, 2, 2]


def test_what_is_kept_has_no_planes_and_other_overrides_leave_them_alone() -> None:
    plan = made([(4, True, 0), (4, True, 0), (4, False, 0)])
    kept = own_recipes(plan, asked(1.5, Override("layers.0.*", keep=True), Override("*.2.*", set={"psp.rank": 3})))
    assert kept["layers.0.x"] is None
    assert [own and own.weights.planes for own in kept.values()] == [None, 2, 1]  # of the two that are left, half
    assert [own and own.psp.rank for own in kept.values()] == [None, 0, 3]


def test_experts_are_alike_and_count_by_their_weights() -> None:
    plan = planned.plan("mixtral")
    found = planes(plan, asked(1.5))
    inside = [x for x in plan.linears if x.block]
    sizes = [x.n_weights for x in inside]
    # all experts of a parameter are one linear, and the largest there is
    assert max(sizes) == next(x for x in inside if x.experts).n_weights
    assert abs(sum(found[x.name] * x.n_weights for x in inside) - 1.5 * sum(sizes)) <= max(sizes) / 2


def test_outside_the_blocks_planes_are_the_whole_part() -> None:
    plan = planned.plan("llama")
    assert planes(plan, asked(1.9))["lm_head"] == 1
    assert planes(plan, asked(3.9))["lm_head"] == 3


def test_whole_planes_are_the_recipe_itself() -> None:
    plan = made([(3, True, 0), (5, False, 0)])
    recipe = load_recipe("bwla-w1a6")
    assert list(own_recipes(plan, recipe).values()) == [recipe, recipe]


@pytest.mark.parametrize("mean", [1, 1.5])
def test_an_override_takes_no_mean(mean: float) -> None:
    plan = made([(3, True, 0), (5, False, 0)])
    with pytest.raises(RecipeError, match=r"gives layers\.1\.x weights\.planes = 1\.5: a mean is for the whole recipe"):
        own_recipes(plan, asked(mean, Override("*.1.x", set={"weights.planes": 1.5})))


def test_an_override_by_a_method_that_chooses_planes_itself_says_so() -> None:
    plan = made([(3, True, 0), (5, False, 0)])
    method = {"signs.method": "paper"}
    with pytest.raises(RecipeError, match="'paper' chooses planes and scales by itself: leave weights as they are"):
        own_recipes(plan, asked(1.5, Override("*.1.x", set=method)))
    alone = own_recipes(plan, asked(1.5, Override("*.1.x", set=method | {"weights.planes": 1})))["layers.1.x"]
    assert alone is not None
    assert alone.weights.planes == 1

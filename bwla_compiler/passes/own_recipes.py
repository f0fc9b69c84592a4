"""Each linear's own recipe: overrides by name, and whole planes where the recipe gives a mean number of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bwla_compiler.errors import RecipeError
from bwla_compiler.graph.plan import Linear, Plan
from bwla_compiler.recipe import MOST_PLANES, Recipe

OwnRecipes = Mapping[str, Recipe | None]
"""By linear of a plan; None where an override keeps it as it is."""


def own_recipes(plan: Plan, recipe: Recipe) -> OwnRecipes:
    """Return the recipe that holds for each linear of a plan, `weights.planes` whole in all of them.

    A mean number of planes is one over the weights of the repeated blocks (of the whole model, where nothing repeats).
    Linears take one plane more than its whole part until it is reached: those that write the residual stream first,
    then the others, in the model's order. A linear is taken where at least half of it is still wanted, so the mean is
    met within half of the largest one. What overrides set stays and counts: the others make up for it, as far as 1 to
    4 planes go. A parameter of experts is one linear, all experts alike. Raises RecipeError for overrides that no
    recipe holds, or that give a mean.
    """
    counts = dict.fromkeys((x.name for x in plan.linears), int(recipe.weights.planes))
    if not recipe.weights.whole:
        counts |= _allocated(plan, recipe)
    by_planes = {n: _with_planes(recipe, n) for n in set(counts.values())}
    found = {name: by_planes[planes].override_for(name) for name, planes in counts.items()}
    for name, own in found.items():
        if own is not None and not own.weights.whole:
            raise RecipeError(
                f"recipe {recipe.name}: an override gives {name} weights.planes = {own.weights.planes}: a mean is for "
                "the whole recipe, an override takes a whole number"
            )
    return found


def _with_planes(recipe: Recipe, planes: int) -> Recipe:
    return replace(recipe, weights=replace(recipe.weights, planes=planes))


def _allocated(plan: Plan, recipe: Recipe) -> dict[str, int]:
    """Return the planes of the linears that the recipe's mean is over and that no override gives a number."""
    inside = [x for x in plan.linears if x.block] or plan.linears
    free, given = _sorted_out(inside, recipe)
    mean = recipe.weights.planes
    if given and free:
        whole = sum(x.n_weights for x in free)
        rest = mean * (whole + sum(x.n_weights for x, _ in given)) - sum(n * x.n_weights for x, n in given)
        mean = min(max(rest / whole, 1), MOST_PLANES)
    floor = math.floor(mean)
    more = _first_linears(free, share=mean - floor)
    return {x.name: floor + (x.name in more) for x in free}


def _sorted_out(linears: Sequence[Linear], recipe: Recipe) -> tuple[list[Linear], list[tuple[Linear, float]]]:
    """Return linears that take the planes of the recipe, and those that an override gives its own, with these.

    Linears that are kept as they are have no planes, and are in neither.
    """
    low, high = (_with_planes(recipe, end(recipe.weights.planes)) for end in (math.floor, math.ceil))
    free: list[Linear] = []
    given: list[tuple[Linear, float]] = []
    for linear in linears:
        fewer, more = low.override_for(linear.name), high.override_for(linear.name)
        if fewer is None or more is None:
            continue
        if fewer.weights.planes == more.weights.planes:  # whatever the recipe says
            given.append((linear, fewer.weights.planes))
        else:
            free.append(linear)
    return free, given


def _first_linears(linears: Sequence[Linear], *, share: float) -> set[str]:
    """Return the names of linears that hold about this share of all weights."""
    order = sorted(linears, key=lambda x: not x.writes_residual)  # stable: in the model's order otherwise
    wanted, taken, found = share * sum(x.n_weights for x in linears), 0, set()
    for linear in order:
        if taken + linear.n_weights / 2 <= wanted:
            found.add(linear.name)
            taken += linear.n_weights
    return found

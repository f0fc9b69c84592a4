"""Overrides of a recipe, held to a model: each pattern must match a linear, each setting be legal."""

import fnmatch

from bwla_compiler.errors import RecipeError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.passes.own_recipes import own_recipes
from bwla_compiler.recipe import Recipe

WHOLE = ("calibration", "tuning", "cache")
"""Sections of a recipe that no linear has of its own; nor has it the fields outside all sections."""


def check_overrides(plan: Plan, recipe: Recipe) -> None:
    """Raise RecipeError for an override that matches nothing in the model, or whose fields are not a recipe's."""
    names = [x.name for x in plan.linears] + [x.name for x in plan.embeddings]
    for entry in recipe.overrides:
        if not any(fnmatch.fnmatch(name, entry.pattern) for name in names):
            raise RecipeError(
                f"override {entry.pattern!r} matches no linear of {plan.model}; names are such as {names[0]} and "
                f"{names[len(names) // 2]}"
            )
        for field in entry.set:
            if "." not in field or field.startswith(tuple(f"{section}." for section in WHOLE)):
                raise RecipeError(f"override {entry.pattern!r}: {field} holds for the whole recipe; set it there")
    own_recipes(plan, recipe)
    for table in plan.embeddings:
        recipe.override_for(table.name)

"""The recipes as a table, with the bits that a weight of a common block takes by each."""

import math
from collections.abc import Iterable

from bwla_compiler.inspector.table import Cell, Table, row
from bwla_compiler.numerics.billm import billm_bits
from bwla_compiler.numerics.bits import claimed_bits, transform_bits
from bwla_compiler.passes.insert_online import whole_factors
from bwla_compiler.recipe import Recipe
from bwla_compiler.spec import LinearSpec, TransformSpec

WIDTH, INNER, HEADS = 4096, 11008, 32
GROUPS = ((WIDTH, (WIDTH,) * 3), (WIDTH, (WIDTH,)), (WIDTH, (INNER,) * 2), (INNER, (WIDTH,)))
"""A block of a 7B Llama: inputs and outputs of {q, k, v}, {o}, {gate, up} and {down}."""

NOTE = f"bits: true bits a weight by formula, in a block of width {WIDTH} and inner width {INNER}"


def recipe_table(recipes: Iterable[Recipe]) -> Table:
    """Return name, purpose, nominal bits and source of each."""
    rows = (row(r.name, r.purpose, f"{nominal_bits(r):.2f}", Cell(r.source, "quiet")) for r in recipes)
    return Table("", ("recipe", "what for", ">bits", "source"), tuple(rows), NOTE)


def nominal_bits(recipe: Recipe) -> float:
    """Return the true bits per weight that a recipe's formats take in the block of GROUPS."""
    bits, weights = 0.0, 0
    for place, (inputs, outputs) in enumerate(GROUPS):
        bits += transform_bits(LinearSpec(inputs, outputs, transform=_transform(recipe, place, inputs)))
        bits += sum(_linear_bits(recipe, inputs, out) for out in outputs)
        weights += inputs * sum(outputs)
    return bits / weights


def _linear_bits(recipe: Recipe, inputs: int, out: int) -> float:
    if recipe.simulated:
        return billm_bits(out, inputs, refined=recipe.signs.method == "arb")
    paper = recipe.signs.method == "paper"  # its pair carries the row means too
    pairs = paper or recipe.signs.method == "descent"
    rank = recipe.psp.rank_for(inputs, out, hidden=WIDTH) if pairs else 0
    kind = "row+column" if paper else recipe.weights.scales
    planes = recipe.weights.planes
    fewer, more = (
        claimed_bits(LinearSpec(inputs, (out,), planes=n, scale_kind=kind, rank=rank + paper))
        for n in (math.floor(planes), math.ceil(planes))
    )
    return (fewer + planes % 1 * (more - fewer)) * inputs * out  # a mean of the two, where planes are a mean


def _transform(recipe: Recipe, place: int, inputs: int) -> TransformSpec:
    """Return the online transform of a group's input: the residual stream's readers stand at even places."""
    rotated = recipe.transform.kind != "none" and recipe.transform.online
    reads_residual = place % 2 == 0
    if not rotated or (reads_residual and recipe.residual != "online"):
        return TransformSpec()
    heads_only = place == 1 and recipe.transform.folded
    scaled = recipe.smoothing.exponent != 0 and recipe.needs_calibration
    if heads_only:
        return TransformSpec("kronecker", HEADS, inputs // HEADS, left=True, scaled=scaled)
    sizes = whole_factors(inputs, recipe)
    return TransformSpec("kronecker", sizes.n1, sizes.n2, left=True, right=True, scaled=scaled, signed=sizes.signed)

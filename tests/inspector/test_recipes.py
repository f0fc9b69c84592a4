"""The table of recipes: bits by formula are those that quantizing counts."""

import pytest

from bwla_compiler.inspector import recipes
from bwla_compiler.inspector.recipes import nominal_bits, recipe_table
from bwla_compiler.recipe import builtin_recipes, load_recipe

ONLINE = nominal_bits(load_recipe("bwla-w1a6", {"psp.hidden_over": 0})) - (1 + 16 / 4096)


def test_every_recipe_has_a_row_with_bits_and_source() -> None:
    table = recipe_table(builtin_recipes().values())
    assert [cells[0].text for cells in table.rows] == list(builtin_recipes())
    assert all(float(cells[2].text) >= 1 and cells[3].text for cells in table.rows)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("rtn", 1 + 16 / 4096),  # scales of down are rarer, the difference is in the tolerance
        ("billm-like", 2.5),
        ("arb-like", 3.0),
        ("bwla-folded", 1 + 16 / 128),
        # 1.18 planes and their scales; beside them the factors of what is online
        ("bwla-mixed-a6", 1.18 * (1 + 16 / 4096) + ONLINE),
    ],
)
def test_bits_are_those_of_the_formula(name: str, expected: float) -> None:
    assert nominal_bits(load_recipe(name)) == pytest.approx(expected, abs=2e-3)


def test_ranks_planes_and_rotations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = {
        key: nominal_bits(load_recipe("bwla-w1a6", {key: value}))
        for key, value in {"psp.rank": 128, "weights.planes": 2, "residual": "online", "name": "same"}.items()
    }
    assert bits["psp.rank"] > bits["name"] + 0.15
    assert bits["weights.planes"] == pytest.approx(bits["name"] + 1, abs=0.01)
    assert bits["residual"] > bits["name"]
    monkeypatch.setattr(recipes, "GROUPS", recipes.GROUPS[:1])  # {q, k, v} alone: nothing is online
    assert nominal_bits(load_recipe("hadamard-rtn")) == pytest.approx(1 + 16 / 4096)


def test_a_hadamard_factor_is_counted_where_the_pass_makes_one_and_nowhere_else() -> None:
    by_signs, fitted = (
        nominal_bits(load_recipe("bwla-w1a6", {"residual": "online", "transform.right": right}))
        for right in ("hadamard", "fitted")
    )
    assert by_signs < fitted
    seeded = {"transform.kind": "hadamard", "residual": "online"}  # a rotation without a fit knows no right factor
    assert (
        len({nominal_bits(load_recipe("rtn", {**seeded, "transform.right": r})) for r in ("hadamard", "fitted")}) == 1
    )

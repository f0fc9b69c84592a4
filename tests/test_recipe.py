"""Recipes: they load, refuse what they do not know, and settings and overrides do what they say."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bwla_compiler.errors import RecipeError
from bwla_compiler.recipe import (
    Override,
    Recipe,
    builtin_recipes,
    from_dict,
    load_recipe,
    parse_setting,
    with_settings,
)

PLAIN = {"name": "x", "source": "this test"}


def test_builtin_recipes_carry_name_source_and_purpose() -> None:
    recipes = builtin_recipes()
    assert {"gptq", "arb-rc", "arb-like", "billm-like", "bwla-paper", "bwla-folded"} <= set(recipes)
    assert {"rtn", "hadamard-rtn", "bwla-w1a6", "bwla-w1a8", "bwla-w1a4", "bwla-w1a16"} <= set(recipes)
    for name, recipe in recipes.items():
        assert recipe.name == name
        assert recipe.source
        assert recipe.purpose


def test_names_say_the_activation_bits() -> None:
    for name, recipe in builtin_recipes().items():
        if name.startswith("bwla-w1a"):
            assert recipe.activations.bits == int(name.removeprefix("bwla-w1a"))


def test_needs_calibration() -> None:
    assert load_recipe("bwla-w1a6").needs_calibration
    assert not load_recipe("rtn").needs_calibration
    assert not load_recipe("bwla-paper").needs_calibration
    assert load_recipe("rtn", {"tuning.steps": 1}).needs_calibration


def test_ranks_are_fixed_or_tied_to_the_width() -> None:
    psp = load_recipe("bwla-w1a6", {"psp.hidden_over": 64}).psp
    assert [psp.rank_for(1024, 512, hidden=h) for h in (256, 32, 0)] == [4, 1, 8]
    assert load_recipe("bwla-w1a6", {"psp.rank": 8}).psp.rank_for(1024, 4, hidden=256) == 4
    # keys of a model 256 wide: 0.25 bits of 256 x 128 weights pay for two columns and rows of int8
    assert [psp.rank_for(256, out, hidden=256) for out in (256, 128, 16)] == [4, 2, 1]
    assert load_recipe("bwla-w1a6", {"psp.most_bits": 1.0}).psp.rank_for(256, 128, hidden=256) == 4
    assert load_recipe("rtn").psp.rank_for(64, 64, hidden=64) == 0


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_dictionary_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    "table, message",
    [
        ({"name": "x"}, "'source' is required"),
        ({**PLAIN, "weigths": {}}, "did you mean 'weights'"),
        ({**PLAIN, "weights": {"plane": 1}}, "did you mean 'planes'"),
        ({**PLAIN, "weights": 1}, "expected a table"),
        ({**PLAIN, "overrides": [{"pattern": "*", "set": 5}]}, r"set: expected a table, found 5"),
        ({**PLAIN, "activations": {"bits": 1}}, "must be 16, or 2 to 8"),
        ({**PLAIN, "activations": {"bits": "6"}}, "must be of type int"),
        ({**PLAIN, "activations": {"bits": True}}, "must be of type int"),
        ({**PLAIN, "residual": "both"}, "must be one of 'folded', 'online', 'none'"),
        ({**PLAIN, "weights": {"planes": 0}}, "must be 1 to 4"),
        ({**PLAIN, "weights": {"planes": 4.5}}, "weights.planes = 4.5: must be 1 to 4, with a fraction for a mean"),
        ({**PLAIN, "weights": {"planes": float("nan")}}, "weights.planes = nan: must be 1 to 4"),
        ({**PLAIN, "weights": {"planes": "two"}}, "weights.planes = 'two': must be of type float"),
        ({**PLAIN, "weights": {"planes": True}}, "must be of type float"),
        ({**PLAIN, "head": {"bits": 5}}, "head.bits = 5: must be 4, 8 or 16"),
        ({**PLAIN, "calibration": {"sequences": 10**21}}, "calibration.length must be 1 to 16,777,216"),
        ({**PLAIN, "head": {"bits": 4, "group_size": 48}}, "head.group_size = 48: must be one of 32, 64, 128"),
        ({**PLAIN, "cache": {"bits": 4}}, "cache.bits = 4: must be 8 or 16"),
        ({**PLAIN, "cache": {"bit": 8}}, "did you mean 'bits'"),
        ({**PLAIN, "psp": {"rank": -1}}, "psp.rank must be 0"),
        ({**PLAIN, "tuning": {"scales": -0.1}}, "rates must be 0 or more"),
        ({**PLAIN, "tuning": {"steps": -1}}, "tuning.steps = -1"),
        ({**PLAIN, "tuning": {"sequences": 0}}, "tuning.sequences must be at least 1"),
        ({**PLAIN, "psp": {"most_bits": 0}}, "psp.most_bits must be above 0"),
        ({**PLAIN, "psp": {"most_bits": float("inf")}}, "psp.most_bits must be above 0, and finite"),
        ({**PLAIN, "psp": {"iterations": 0}}, "psp.iterations = 0: must be at least 1"),
        ({**PLAIN, "transform": {"iterations": -1}}, "transform.iterations = -1: must be 0 or more"),
        ({**PLAIN, "smoothing": {"exponent": float("nan")}}, r"smoothing.exponent = nan: must be 0 \(off\) to 1"),
        ({**PLAIN, "signs": {"damping": float("inf")}}, "signs.damping = inf: must be 0 or more, and finite"),
        ({**PLAIN, "tuning": {"pairs": float("inf")}}, "rates must be 0 or more, and finite"),
        ({**PLAIN, "signs": {"damping": -0.1}}, "signs.damping = -0.1: must be 0 or more"),
        ({**PLAIN, "target": {"damping": float("nan")}}, "target.damping = nan: must be 0 or more"),
        ({**PLAIN, "transform": {"folded": False}}, 'needs residual = "online"'),
        ({**PLAIN, "weights": {"scales": "group"}}, "takes no low-rank pair"),
        ({**PLAIN, "psp": {"hidden_over": 0}, "weights": {"scales": "row+column"}}, "'round' alone"),
        (
            {
                **PLAIN,
                "psp": {"hidden_over": 0},
                "signs": {"method": "round"},
                "weights": {"scales": "row+column", "planes": 1.5},
            },
            "in one plane; here are 'round' and weights.planes = 1.5",
        ),
        ({**PLAIN, "signs": {"method": "billm"}, "weights": {"planes": 2}}, "by itself"),
        ({**PLAIN, "signs": {"method": "paper"}, "weights": {"planes": 1.18}}, "leave weights as they are"),
        ({**PLAIN, "overrides": {"pattern": "*"}}, "expected a list"),
        ({**PLAIN, "overrides": [{"keep": True}]}, "'pattern' is required"),
        ({"name": "x", "source": "y", "transform": {"budget": 1.5}}, "transform.budget = 1.5: must be 0 to 1"),
        ({"name": "x", "source": "y", "transform": {"device": "abacus"}}, "must be one of h100-sxm"),
    ],
)
def test_bad_tables_are_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_dict(table)


def test_whole_planes_are_written_as_before_and_a_mean_as_it_is() -> None:
    for number in (2, 2.0):
        recipe = load_recipe("rtn", {"weights.planes": number})
        assert type(recipe.weights.planes) is int
        assert repr(recipe.weights) == "Weights(planes=2, scales='row')"
        assert json.dumps(recipe.to_dict()["weights"]) == '{"planes": 2, "scales": "row"}'
    assert repr(load_recipe("bwla-w1a6").weights) == "Weights(planes=1, scales='row')"
    mean = load_recipe("rtn", dict([parse_setting("weights.planes=1.18")]))
    assert json.dumps(mean.to_dict()["weights"]) == '{"planes": 1.18, "scales": "row"}'
    assert from_dict(json.loads(json.dumps(mean.to_dict()))) == mean


def test_the_mixed_recipe_is_the_default_without_its_pair_in_more_planes() -> None:
    mixed, default = load_recipe("bwla-mixed-a6"), load_recipe("bwla-w1a6")
    changed = with_settings(default, {"weights.planes": 1.18, "psp.hidden_over": 0})
    assert mixed == dataclasses.replace(changed, name=mixed.name, source=mixed.source, purpose=mixed.purpose)


def test_load_by_name_file_and_object(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nsource = "me"\nactivations = { bits = 5 }\n')
    assert load_recipe(file).activations.bits == 5
    assert load_recipe(str(file), {"activations.bits": 7}).activations.bits == 7
    assert load_recipe(load_recipe("rtn")) == load_recipe("rtn")


def test_load_refuses_unknown_names_and_bad_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'bwla-w1a6'"):
        load_recipe("bwla-w1a66")
    with pytest.raises(RecipeError, match=r"absent\.toml"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(RecipeError, match=r"bad\.toml"):
        load_recipe(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("psp.hidden_over=32", ("psp.hidden_over", 32)),
        ("smoothing.exponent = 0.25", ("smoothing.exponent", 0.25)),
        ("target.drift=false", ("target.drift", False)),
        ("residual=online", ("residual", "online")),
        ('residual="online"', ("residual", "online")),
    ],
)
def test_settings_are_read_as_toml_else_as_text(text: str, expected: tuple[str, object]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["psp.hidden_over", "=3", " =3"])
def test_a_setting_needs_key_and_value(text: str) -> None:
    with pytest.raises(RecipeError, match=r"section\.field=value"):
        parse_setting(text)


def test_settings_change_one_field_and_know_their_names() -> None:
    recipe = load_recipe("rtn")
    changed = with_settings(recipe, {"psp.hidden_over": 32})
    assert changed == dataclasses.replace(recipe, psp=dataclasses.replace(recipe.psp, hidden_over=32))
    for key in ("psp.hidden", "pps.hidden_over"):
        with pytest.raises(RecipeError, match="unknown key"):
            with_settings(recipe, {key: 1})
    for key, value in (("residual.x", "residual"), ("psp.hidden_over.deep", "hidden_over")):
        with pytest.raises(RecipeError, match=f"setting {key!r}: {value} is one value; set {value} itself"):
            with_settings(recipe, {key: 1})


@pytest.mark.parametrize("turned", [False, True])
def test_what_several_overrides_set_holds_together(turned: bool) -> None:
    entries = (Override("*", set={"weights.scales": "group"}), Override("*.q", set={"psp.hidden_over": 0}))
    recipe = dataclasses.replace(load_recipe("bwla-w1a6"), overrides=entries[::-1] if turned else entries)
    found = recipe.override_for("layers.0.q")  # groups of columns alone, with a pair beside them, are refused
    assert found is not None
    assert (found.weights.scales, found.psp.wanted) == ("group", False)


def test_overrides_hold_for_matching_linears_only() -> None:
    recipe = dataclasses.replace(
        load_recipe("rtn"),
        overrides=(Override("*.down_proj", set={"weights.planes": 2}), Override("layers.0.*", keep=True)),
    )
    assert recipe.override_for("layers.0.q_proj") is None
    assert recipe.override_for("layers.0.down_proj") is None
    down = recipe.override_for("layers.1.down_proj")
    assert down is not None
    assert down.weights.planes == 2
    assert recipe.override_for("layers.1.q_proj") == recipe


@given(bits=st.integers(-3, 40))
@hypothesis_settings(deadline=None, max_examples=40)
def test_activation_bits_are_16_or_2_to_8(bits: int) -> None:
    try:
        recipe: Recipe | None = load_recipe("rtn", {"activations.bits": bits})
    except RecipeError:
        recipe = None
    assert (recipe is not None) == (bits == 16 or 2 <= bits <= 8)

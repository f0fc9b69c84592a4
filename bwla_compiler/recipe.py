"""Recipes: what is done to a model, as frozen data read from TOML. Unknown keys are errors.

A recipe's fields are one set of names for `bwla.quantize(...)`, for `options=` of the backend and for
`--set section.field=value` of the CLI.
"""

import dataclasses
import difflib
import fnmatch
import math
import tomllib
import typing
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from bwla_compiler.cost.devices import DEVICES
from bwla_compiler.errors import RecipeError
from bwla_compiler.numerics.bits import FACTOR_BITS
from bwla_compiler.recipe_reading import build, unknown_key
from bwla_compiler.spec import CACHE_BITS, END_GROUPS, FLOAT_BITS, INT8_ROWS, Coding

DATA_FREE = frozenset(("round", "paper"))
SIMULATED = frozenset(("billm", "arb"))
MOST_PLANES = 4
MOST_TOKENS = 2**24
"""Of a calibration sequence, and sequences: more is a slip of the hand, which would end in an overflow."""


@dataclass(frozen=True)
class Weights:
    """planes: binary planes per weight, 1 to 4; every plane costs a bit. Where it is no whole number, a mean.

    A mean of 1.18 gives some linears one plane and some two (see `passes.own_recipes`). scales: of each plane, one a
    "row", one a "row+column" (a row's times a column's), or one a row and "group" of 128 columns.
    """

    planes: float = 1
    scales: Literal["row", "row+column", "group"] = "row"

    def __post_init__(self) -> None:
        if self.whole:
            object.__setattr__(self, "planes", int(self.planes))  # one number, one text: 2 and 2.0 are one recipe

    @property
    def whole(self) -> bool:
        """Whether planes is a whole number."""
        return float(self.planes).is_integer()

    @property
    def n_planes(self) -> int:
        """planes of one linear, which are whole."""
        assert self.whole, f"{self.planes} planes are a mean: ask own_recipes for each linear's"
        return int(self.planes)


@dataclass(frozen=True)
class Activations:
    """Bits of a linear's input: 2 to 8 rounds per token, 16 leaves it as it is."""

    bits: int = 6


@dataclass(frozen=True)
class Transform:
    """The rotation of a linear's input where it is not the identity.

    kind: "none"; "hadamard" (seeded, no fit); "okt" (orthogonal Kronecker fitted by EM). right: of an online "okt", the
    factor that mixes neighbouring channels: "fitted" like the left one, or "hadamard", random signs before a Hadamard
    matrix, which costs additions alone and is stored as signs, where the channels are a multiple of a long enough power
    of two. online: False leaves an
    input that no folded rotation reaches in its own basis. folded: False folds nothing, so that all inputs are
    rotated online (then `residual` must be "online"). soft: posterior means in place of signs in the E-step.
    start: of the fit. budget: the largest share of a group's modelled time that its online transform may take when
    one token is decoded on `device` (of cost.devices), 1 for no limit; where it would take more, blocks of channels
    get a Hadamard, or the input is not turned at all.
    """

    kind: Literal["none", "hadamard", "okt"] = "okt"
    right: Literal["fitted", "hadamard"] = "hadamard"
    online: bool = True
    folded: bool = True
    iterations: int = 30
    soft: bool = False
    start: Literal["hadamard", "identity"] = "hadamard"
    budget: float = 1.0
    device: str = "cpu-avx512"


@dataclass(frozen=True)
class Smoothing:
    """Diagonal scaling max|x|^exponent / max|w|^(1 - exponent) before an online transform; 0 is off."""

    exponent: float = 0.5


@dataclass(frozen=True)
class Target:
    """Drift correction: fit what the fp stream would have produced on the quantized stream."""

    drift: bool = True
    damping: float = 0.03


@dataclass(frozen=True)
class LowRank:
    """PSP: an int8 low-rank pair beside the signs.

    rank: of the pair; 0 ties it to the model's width: max(1, hidden // hidden_over), or none where hidden_over is 0.
    most_bits: what a pair whose rank is tied to the width may cost, per weight of its linear; 1 is the least rank. It
    binds where a linear is much narrower than the model (keys and values that several heads share).
    """

    hidden_over: int = 64
    most_bits: float = 0.25
    rank: int = 0
    iterations: int = 4

    @property
    def wanted(self) -> bool:
        """Whether there is a pair at all."""
        return self.rank > 0 or self.hidden_over > 0

    def rank_for(self, in_features: int, out_features: int, *, hidden: int) -> int:
        """Return the rank of one linear's pair; hidden: the model's width, 0 where it is not known.

        Not tied to in_features, which would cost down projections most.
        """
        if not self.wanted:
            return 0
        width = hidden or min(in_features, out_features)
        affordable = int(self.most_bits * in_features * out_features / (FACTOR_BITS * (in_features + out_features)))
        tied = max(1, min(width // max(1, self.hidden_over), affordable))
        return min(self.rank or tied, in_features, out_features)


@dataclass(frozen=True)
class Signs:
    """How signs are chosen: "round" (sign of the weight), "gptq" (greedy feedback), "descent", or by a whole method.

    "paper": the BWLA paper's data-free low-rank pair, row means, row and column scales. "billm" and "arb": BiLLM's
    weights, and the same with ARB's refinements; no packed format holds these, so the weights stay floats and the
    bytes that they would take are counted.
    """

    method: Literal["round", "gptq", "descent", "paper", "billm", "arb"] = "descent"
    sweeps: int = 4
    damping: float = 0.2


@dataclass(frozen=True)
class Tuning:
    """Distillation of the float model into what is stored beside the signs, once all linears are packed.

    steps: of gradient descent, each on so many calibration sequences; 0 is off. scales, diagonals, pairs, gains,
    biases: Adam's rate for row scales, online diagonals, low-rank pairs, norm gains and linears' biases, relative to
    their size; 0 keeps them. signs: how far chance alone would carry a sign's latent number over all steps, in units of
    its start; 0 keeps the signs, and their memory at a bit (see `calibrate.student`). signs_at_once: whether those of
    the whole "model" learn together, or in turn those of one "block", each for its share of the steps: two bytes of
    memory then for each weight of a block, not of the model. products: "fastest" rounds the factors of matrix products
    to bfloat16 where the processor has units for these (see `numerics.products`), "float32" never does.
    """

    steps: int = 0
    sequences: int = 4
    scales: float = 0.003
    diagonals: float = 0.001
    pairs: float = 0.01
    gains: float = 0.001
    biases: float = 0.001
    signs: float = 0.0
    signs_at_once: Literal["model", "block"] = "model"
    products: Literal["fastest", "float32"] = "fastest"


@dataclass(frozen=True)
class Calibration:
    """The tokens of a calibrated run.

    expert_tokens: an expert that fewer tokens are routed to gets its statistics blended with those of all experts'
    tokens, in proportion to what it lacks.
    """

    sequences: int = 128
    length: int = 256
    expert_tokens: int = 256


@dataclass(frozen=True)
class Head:
    """Bits of lm_head and embeddings: 8 (a scale a row), 4 (one for `group_size` columns of it) or 16 (left alone)."""

    bits: int = 8
    group_size: int = 64

    @property
    def coding(self) -> Coding | None:
        """How an end is stored, None where it is left alone."""
        if self.bits >= FLOAT_BITS:
            return None
        return Coding(4, self.group_size) if self.bits == 4 else INT8_ROWS


@dataclass(frozen=True)
class Cache:
    """Bits of the keys and values that `generate` keeps: 16 (the model's floats) or 8 (a scale a token and head)."""

    bits: int = 16


@dataclass(frozen=True)
class Override:
    """Fields changed for the linears whose names match `pattern` (shell style); keep=True leaves them alone."""

    pattern: str
    keep: bool = False
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One way to quantize a model. See the classes of its sections for their fields.

    residual: where the residual stream's rotation lives: "folded" into all its writers and readers,
    "online" after each norm, or "none". tied: what becomes of an embedding that is also the head:
    "online" keeps one copy in its own basis, "untie" stores two.
    """

    name: str
    source: str
    purpose: str = ""
    weights: Weights = Weights()
    activations: Activations = Activations()
    transform: Transform = Transform()
    residual: Literal["folded", "online", "none"] = "folded"
    tied: Literal["online", "untie"] = "online"
    smoothing: Smoothing = Smoothing()
    target: Target = Target()
    psp: LowRank = LowRank()
    signs: Signs = Signs()
    tuning: Tuning = Tuning()
    calibration: Calibration = Calibration()
    head: Head = Head()
    cache: Cache = Cache()
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        _check_ranges(self)

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe's algorithms look at activations."""
        return self.target.drift or self.signs.method not in DATA_FREE or self.tuning.steps > 0

    @property
    def simulated(self) -> bool:
        """Whether the weights stay floats, for no packed format holds them."""
        return self.signs.method in SIMULATED

    def override_for(self, linear: str) -> "Recipe | None":
        """Return the recipe that holds for one linear, or None where an override keeps it as it is."""
        changes: dict[str, Any] = {}
        for entry in self.overrides:
            if fnmatch.fnmatch(linear, entry.pattern):
                if entry.keep:
                    return None
                changes |= entry.set
        return with_settings(self, changes) if changes else self  # together: one may need another

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data; `from_dict` gives it back."""
        return dataclasses.asdict(self)


def _check_ranges(recipe: Recipe) -> None:
    bits = recipe.activations.bits
    checks = {
        f"activations.bits = {bits}: must be 16, or 2 to 8": bits == 16 or 2 <= bits <= 8,
        f"weights.planes = {recipe.weights.planes}: must be 1 to {MOST_PLANES}, with a fraction for a mean": (
            1 <= recipe.weights.planes <= MOST_PLANES
        ),
        f"head.bits = {recipe.head.bits}: must be 4, 8 or 16": recipe.head.bits in (4, 8, 16),
        f"head.group_size = {recipe.head.group_size}: must be one of {', '.join(map(str, END_GROUPS))}": (
            recipe.head.group_size in END_GROUPS
        ),
        f"cache.bits = {recipe.cache.bits}: must be {' or '.join(map(str, CACHE_BITS))}": (
            recipe.cache.bits in CACHE_BITS
        ),
        f"tuning.steps = {recipe.tuning.steps}: must be 0 (off) or more": recipe.tuning.steps >= 0,
        "tuning.sequences must be at least 1": recipe.tuning.sequences >= 1,
        "tuning's rates must be 0 or more, and finite": all(
            0 <= value < math.inf for value in dataclasses.asdict(recipe.tuning).values() if isinstance(value, float)
        ),
        f"signs.sweeps = {recipe.signs.sweeps}: must be at least 1": recipe.signs.sweeps >= 1,
        f"signs.damping = {recipe.signs.damping}: must be 0 or more, and finite": 0 <= recipe.signs.damping < math.inf,
        f"target.damping = {recipe.target.damping}: must be 0 or more, and finite": (
            0 <= recipe.target.damping < math.inf
        ),
        f"smoothing.exponent = {recipe.smoothing.exponent}: must be 0 (off) to 1": 0 <= recipe.smoothing.exponent <= 1,
        f"transform.iterations = {recipe.transform.iterations}: must be 0 or more": recipe.transform.iterations >= 0,
        f"psp.iterations = {recipe.psp.iterations}: must be at least 1": recipe.psp.iterations >= 1,
        f"calibration.sequences and calibration.length must be 1 to {MOST_TOKENS:,}": all(
            1 <= value <= MOST_TOKENS for value in (recipe.calibration.sequences, recipe.calibration.length)
        ),
        f"transform.budget = {recipe.transform.budget}: must be 0 to 1": 0 <= recipe.transform.budget <= 1,
        f"transform.device = {recipe.transform.device!r}: must be one of {', '.join(DEVICES)}": (
            recipe.transform.device in DEVICES
        ),
        "psp.hidden_over must be 0 (no low rank) or more": recipe.psp.hidden_over >= 0,
        "psp.rank must be 0 (tied to the width) or more": recipe.psp.rank >= 0,
        "psp.most_bits must be above 0, and finite": 0 < recipe.psp.most_bits < math.inf,
        'transform.folded = false needs residual = "online"': recipe.transform.folded or recipe.residual == "online",
        "calibration.expert_tokens must be at least 1": recipe.calibration.expert_tokens >= 1,
    }
    checks |= _combinations(recipe)
    for message, holds in checks.items():
        if not holds:
            raise RecipeError(f"recipe {recipe.name}: {message}")


def _combinations(recipe: Recipe) -> dict[str, bool]:
    """Return what the fits can do together."""
    method, scales, planes = recipe.signs.method, recipe.weights.scales, recipe.weights.planes
    whole = method in SIMULATED | {"paper"}
    return {
        f"signs.method = {method!r} chooses planes and scales by itself: leave weights as they are": not whole
        or recipe.weights == Weights(),
        f"weights.scales = {scales!r} takes no low-rank pair beside it: set psp.hidden_over = 0 and psp.rank = 0": (
            scales == "row" or not recipe.psp.wanted
        ),
        f"weights.scales = 'row+column' is fitted by signs.method = 'round' alone, in one plane; here are {method!r} "
        f"and weights.planes = {planes}": scales != "row+column" or (method == "round" and planes == 1),
    }


def from_dict(table: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Return the recipe that a table describes. Raises RecipeError for unknown keys, wrong types and ranges."""
    return typing.cast(Recipe, build(Recipe, table, where))


def with_settings(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Return the recipe with dotted fields changed, as in {"psp.hidden_over": 32, "residual": "online"}."""
    table = recipe.to_dict()
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = table
        for section in sections:
            if section not in place:
                raise unknown_key(section, list(place), f"recipe {recipe.name}, setting {key!r}")
            if not isinstance(place[section], dict):
                raise RecipeError(
                    f"recipe {recipe.name}, setting {key!r}: {section} is one value; set {section} itself"
                )
            place = place[section]
        if last not in place:
            raise unknown_key(last, list(place), f"recipe {recipe.name}, setting {key!r}")
        place[last] = value
    return from_dict(table, where=f"recipe {recipe.name}")


def parse_setting(text: str) -> tuple[str, Any]:
    """Return the key and value of `section.field=value`; the value is read as TOML, else as a plain string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"setting {text!r}: write it as section.field=value, for instance psp.hidden_over=32")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


@cache
def builtin_recipes() -> dict[str, Recipe]:
    """Return the recipes that the package carries, by name."""
    folder = resources.files("bwla_compiler") / "recipes"
    tables = {f.name: tomllib.loads(f.read_text("utf-8")) for f in folder.iterdir() if f.name.endswith(".toml")}
    recipes = [from_dict(table, where=name) for name, table in sorted(tables.items())]
    return {r.name: r for r in recipes}


def load_recipe(recipe: "str | Path | Recipe", settings: dict[str, Any] | None = None) -> Recipe:
    """Return a recipe by name, by TOML file or as given, with dotted settings applied.

    Raises RecipeError for an unknown name, an unreadable file, or a bad setting.
    """
    if isinstance(recipe, Recipe):
        found = recipe
    elif str(recipe).endswith(".toml"):
        try:
            found = from_dict(tomllib.loads(Path(recipe).read_text("utf-8")), where=str(recipe))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"recipe file {recipe}: {error}") from error
    elif (known := builtin_recipes()) and recipe not in known:
        near = difflib.get_close_matches(str(recipe), list(known), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"recipe {str(recipe)!r} is not known.{hint} Known: {', '.join(known)}; or give a .toml file")
    else:
        found = builtin_recipes()[str(recipe)]
    return with_settings(found, settings) if settings else found

"""Published figures, and the verdict on a model of one's own beside one of them.

A row passes where the measured perplexity is at most the published one and the true bits are at most the published
ones, as they are counted there; a float row passes where it is met within TOLERANCE, which checks the protocol.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.errors import ResultsError

FILE = Path(__file__).with_name("anchors.toml")
TOLERANCE = 0.005
"""Relative, of a float model's perplexity: tables round to the second decimal, and dtypes differ."""


@dataclass(frozen=True)
class Anchor:
    """One published figure. bits: of a weight; counted: "claimed" or "true". shape: (hidden size, blocks)."""

    table: str
    method: str
    model: str
    hub_id: str
    shape: tuple[int, int]
    activations: int
    bits: float
    counted: str
    perplexity: float
    source: str

    @property
    def key(self) -> str:
        """The name that `--anchor` takes."""
        return f"{self.table}/{self.method}/A{self.activations}/{self.model}"

    @property
    def floats(self) -> bool:
        """Whether the figure is of the float model."""
        return self.method == "FP16"

    def command(self) -> str:
        """Return the command that measures a model folder beside this figure."""
        bits = "" if self.floats else f" --activations {self.activations}"
        return f"bwla-compile bench quality --anchor '{self.key}' --model DIR --data wiki.test.raw{bits}"


@dataclass(frozen=True)
class Verdict:
    """What was measured beside an anchor, and whether it passes, in words too."""

    passed: bool
    said: str


@cache
def anchors(file: Path = FILE) -> tuple[Anchor, ...]:
    """Return all published figures in the order of the file."""
    data = tomllib.loads(file.read_text("utf-8"))
    found = []
    for table, content in data["tables"].items():
        for method, activations, bits, *values in content["rows"]:
            for model, value in zip(content["models"], values, strict=True):
                if value != "-":
                    about = data["models"][model]
                    found.append(_anchor(table, content, (method, activations, bits), model, about, float(value)))
    return tuple(found)


def _anchor(
    table: str, content: dict[str, Any], row: tuple[str, int, float], model: str, about: Sequence[Any], value: float
) -> Anchor:
    hub_id, hidden, blocks = about
    method, activations, bits = row
    return Anchor(
        table,
        method,
        model,
        hub_id,
        (hidden, blocks),
        activations,
        float(bits),
        content["bits"],
        value,
        content["source"],
    )


def anchor(key: str, known: Sequence[Anchor] | None = None) -> Anchor:
    """Return the figure of that key. Raises ResultsError, naming near ones."""
    found = {a.key: a for a in known or anchors()}
    if key not in found:
        near = [name for name in found if key.lower() in name.lower()] or list(found)
        raise ResultsError(f"no published figure is called {key!r}; there are {', '.join(near[:8])}")
    return found[key]


def check_model(config: Any, wanted: Anchor) -> None:
    """Raise ResultsError where a model's config cannot be of the model that was published on."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    shape = (text.hidden_size, text.num_hidden_layers)
    if shape != wanted.shape:
        raise ResultsError(
            f"{wanted.key} is of {wanted.hub_id}, width {wanted.shape[0]} in {wanted.shape[1]} blocks, this one "
            f"{shape[0]} in {shape[1]}: figures of different models cannot be compared"
        )


def verdict(wanted: Anchor, *, perplexity: float, true_bits: float | None) -> Verdict:
    """Return whether measured figures pass beside a published one. true_bits: None of a float model."""
    ours = f"{perplexity:.2f}" + ("" if true_bits is None else f" at {true_bits:.2f} true bits")
    theirs = f"{wanted.perplexity:.2f}" + ("" if wanted.floats else f" at {wanted.bits:.2f} {wanted.counted} bits")
    if wanted.floats:
        off = perplexity / wanted.perplexity - 1
        passed = abs(off) <= TOLERANCE
        return Verdict(passed, f"{ours} against {theirs}: {off:+.2%}, allowed {TOLERANCE:.1%} either way")
    lower, smaller = perplexity <= wanted.perplexity, true_bits is not None and true_bits <= wanted.bits
    words = f"perplexity {'at most' if lower else 'above'} theirs, bits {'at most' if smaller else 'above'} theirs"
    return Verdict(lower and smaller, f"{ours} against {theirs}: {words}")

"""The papers' protocol of perplexity: WikiText-2's test split as one text, in windows of 2048 tokens side by side.

Each window stands alone and predicts all its tokens but the first; what does not fill a window is left out (as in the
evaluation code of GPTQ, arXiv 2210.17323, which the papers of this field share).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from benchmarks.anchors import Anchor, check_model, verdict
from benchmarks.errors import ResultsError
from bwla_compiler import api
from bwla_compiler.runtime.modules import PackedLinear, set_activation_bits
from bwla_compiler.tokens import from_ids

Progress = Callable[[str, int, int], None]

CONTEXT = 2048
HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")


def measure_anchor(
    wanted: Anchor,
    *,
    model: str,
    data: str = "",
    activations: int = 0,
    context: int = CONTEXT,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return a row: the published figure, the measured one of a model folder, and "pass" or "fail".

    data: a file of the test split (see `split_text`), "" for the hub. activations: bits for a packed model, 0 for its
    own. Raises ResultsError where the model is not the published one, or its activations have other bits.
    """
    loaded = api.load(model, progress=progress)
    check_model(loaded.model.config, wanted)
    packed = any(isinstance(m, PackedLinear) for m in loaded.model.modules())
    if packed == wanted.floats:
        raise ResultsError(f"{wanted.key} is of {'floats' if wanted.floats else 'a packed model'}, unlike {model}")
    if packed:
        _set_bits(loaded.model, wanted, activations)
    tokens = windows(split_text(data), loaded.tokenizer, context=context)
    perplexity = api.perplexity(loaded.model, tokens, progress=progress)
    true_bits = api.bits(loaded.model).linears if packed else None
    found = verdict(wanted, perplexity=perplexity, true_bits=true_bits)
    return {
        "anchor": wanted.key,
        "source": wanted.source,
        "model": model,
        "context": context,
        "windows": len(tokens),
        "published": wanted.perplexity,
        "perplexity": round(perplexity, 4),
        "true_bits": None if true_bits is None else round(true_bits, 4),
        "verdict": "pass" if found.passed else "fail",
        "said": found.said,
    }


def _set_bits(model: Any, wanted: Anchor, activations: int) -> None:
    if activations:
        set_activation_bits(model, activations)
    own = {m.activation_bits for m in model.modules() if isinstance(m, PackedLinear)}
    if own != {wanted.activations}:
        raise ResultsError(
            f"{wanted.key} rounds activations to {wanted.activations} bits, the model to {sorted(own)}: give "
            f"--activations {wanted.activations}"
        )


def split_text(data: str = "") -> str:
    """Return the test split as the papers join it: the lines of the set with an empty line between any two.

    data: wiki.test.raw as it is published, .jsonl with a "text" a line, or any other text, taken as it is; "" asks the
    hub through the package `datasets`. Raises ResultsError where there is none.
    """
    if not data:
        return "\n\n".join(_from_hub())
    path = Path(data)
    if not path.is_file():
        raise ResultsError(f"{data}: there is no such file; give WikiText-2's test split with --data")
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        return "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    if path.suffix == ".raw":
        return "\n\n".join(line + "\n" if line.strip() else "" for line in text.split("\n"))
    return text


def _from_hub() -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ResultsError(
            "WikiText-2 is read from the hub by the package datasets, which is not installed: pip install datasets, or "
            "give the file of the test split with --data"
        ) from error
    return [str(text) for text in load_dataset(*HUB, split="test")["text"]]


def windows(text: str, tokenizer: Any, *, context: int) -> Tensor:
    """Return whole windows [n, context] int64 of a text with the tokenizer's own beginning. Raises CalibrationError."""
    if tokenizer is None:
        raise ResultsError("the model's folder has no tokenizer: the text cannot be read")
    return from_ids(tensor(tokenizer(text, verbose=False)["input_ids"]), length=context, where="the test text")

"""A float model as a GGUF file whose linears have a type of ggml, for llama.cpp as a contender.

Embedding and head are Q8_0 in every file, as ours are int8, so that ways differ in the linears; norms are F32.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.errors import ResultsError
from benchmarks.ggml import ggml
from bwla_compiler import api
from bwla_compiler.checkpoint.gguf_blocks import SIGN_COLUMNS, sign_blocks
from bwla_compiler.checkpoint.gguf_family import family_of
from bwla_compiler.checkpoint.gguf_file import About, gguf_package, write_gguf
from bwla_compiler.checkpoint.gguf_floats import float_tensors

ENDS, ENDS_KIND = ("token_embd", "output"), "Q8_0"


def write_float_gguf(folder: str | Path, file: Path, *, kind: str) -> Path:
    """Write a float model's folder as one GGUF file with linears of a type, and return its path.

    Without a tokenizer: its readers give ids. Raises CheckpointError for other families than llama.cpp's that are
    known, and ResultsError for widths that the type's blocks do not divide.
    """
    gguf_package()
    model: Any = api.load(folder).model
    family = family_of(model)
    tensors = float_tensors(model, family, matrix=partial(_matrix, kind=kind))
    about = About(f"linears {kind}, embedding and head {ENDS_KIND}", f"MOSTLY_{kind}")
    return write_gguf(file, tensors, config=model.config, family=family, about=about)


def _matrix(name: str, weight: Tensor, *, kind: str) -> tuple[Any, str | None]:
    own = ENDS_KIND if name in ENDS else kind
    return blocks(name, weight, kind=own), own


def blocks(name: str, weight: Tensor, *, kind: str) -> np.ndarray:
    """Return a matrix [out, in] in a type, rounded as llama.cpp's own tools round it: [out, bytes of a row] uint8.

    name: for errors. IQ1_S takes every column for as important as any other. Raises ResultsError where the blocks do
    not fit, or the type needs ggml and that is not there.
    """
    gguf = gguf_package()
    number = gguf.GGMLQuantizationType[kind]
    columns, _ = gguf.GGML_QUANT_SIZES[number]
    if weight.shape[1] % columns:
        raise ResultsError(f"{name} has {weight.shape[1]} inputs, and {kind} takes multiples of {columns}")
    weight = weight.detach().float().cpu().contiguous()
    found: np.ndarray = MAKERS[kind](weight) if kind in MAKERS else gguf.quants.quantize(weight.numpy(), number)
    return found.view(np.uint8)


def _signs(weight: Tensor) -> np.ndarray:
    """Return Q1_0: the sign of each weight, and the mean of |w| over 128 columns."""
    rows = len(weight)
    scale = weight.view(rows, -1, SIGN_COLUMNS).abs().mean(-1)
    plus = torch.from_numpy(np.packbits(weight.numpy() >= 0, axis=1, bitorder="little"))
    return sign_blocks(plus, scale, name="weight")


def _by_ggml(weight: Tensor, *, kind: str) -> np.ndarray:
    library = ggml()
    if library is None:
        raise ResultsError(f"{kind} is rounded by ggml itself, and llama-cpp-python is not installed")
    return library.packed(weight, kind).reshape(len(weight), -1)


MAKERS: dict[str, Callable[[Tensor], np.ndarray]] = {"Q1_0": _signs, "IQ1_S": partial(_by_ggml, kind="IQ1_S")}
"""Types that the package gguf does not round to."""


def lacking(kind: str) -> str:
    """Return why llama.cpp here cannot compute a type, "" where it can or is not there."""
    library = ggml()
    if library is None or kind in ("F16", "BF16") or library.has(kind):
        return ""
    return f"ggml of {library.version} has no {kind}"

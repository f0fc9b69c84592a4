"""Peers that are looked for at run time: what each way of a model loads, or why it cannot."""

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.errors import ResultsError
from benchmarks.gguf_model import lacking

Source = Literal["float", "packed"]

LLAMA: Literal["llama.cpp"] = "llama.cpp"
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
MODULES = {"llama-cpp-python": "llama_cpp"}
"""Packages that are imported under another name."""


@dataclass(frozen=True)
class Way:
    """A way to run a model.

    source: which folder it loads. compiler: who compiles it. tolerance: the relative error of its logits, against those
    of `reference` (another way's name, "" for none), above which it is not timed. quantize: edits the loaded model.
    options: the mode of torch.compile. freeze: whether Inductor may take weights for constants, and pack them as it
    likes (its setting `freezing`). needs: packages. ggml: the type of the linears in the file that llama.cpp reads.
    int8_cache: whether keys and values are kept in int8. default: whether it is run unasked.
    """

    name: str
    dtype: torch.dtype
    compiler: Literal["eager", "inductor", "bwla", "llama.cpp"]
    source: Source = "float"
    reference: str = "eager fp32"
    tolerance: float = 0.1
    needs: tuple[str, ...] = ()
    options: str = ""
    freeze: bool = False
    ggml: str = ""
    int8_cache: bool = False
    default: bool = True
    quantize: Callable[[nn.Module], None] | None = None

    def missing(self) -> str:
        """Return why this way cannot run here, "" where it can."""
        for package in self.needs:
            if importlib.util.find_spec(MODULES.get(package, package.replace("-", "_"))) is None:
                return f"{package} is not installed"
        return lacking(self.ggml) if self.ggml else ""

    def version(self) -> str:
        """Return the versions of what this way needs beside torch, "" where that is nothing."""
        return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in self.needs)


def _torchao(config: str, **options: Any) -> Callable[[nn.Module], None]:
    """Return what quantizes a model's linears with a config of torchao, by its dotted name."""

    def quantize(model: nn.Module) -> None:
        logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of GPU kernels that it does not find
        from torchao.quantization import quantize_

        module, _, name = config.rpartition(".")
        quantize_(model, getattr(importlib.import_module(module), name)(**options))

    return quantize


FP32, BF16 = torch.float32, torch.bfloat16


def _llama(kind: str, *, tolerance: float | None = None, default: bool = False) -> Way:
    """Return llama.cpp with linears of a type; without a tolerance its logits need only be finite."""
    return Way(
        f"llama.cpp {kind}", FP32, LLAMA, reference="" if tolerance is None else "eager fp32",
        tolerance=tolerance or 0.0, needs=("llama-cpp-python", "gguf"), ggml=kind, default=default,
    )  # fmt: skip


# Tolerances: of float32 under another compiler only the order of sums differs; bfloat16 keeps 8 bits of each of some
# hundred roundings; int8 and int4 of a tensor of random weights leave about 1 and 10 percent a linear. llama.cpp's
# embedding and head of Q8_0 leave 1 percent by themselves, its 8 bits of activations as much a linear, and Q4_0 rounds
# 32 weights together: 8 percent a linear. What one bit or two make of random weights is near to nothing.
WAYS = (
    Way("eager fp32", FP32, "eager", reference=""),
    Way("eager bf16", BF16, "eager"),
    Way("inductor fp32", FP32, "inductor", tolerance=1e-3),
    Way("inductor bf16", BF16, "inductor"),
    Way("inductor bf16, max-autotune", BF16, "inductor", options=MAX_AUTOTUNE, freeze=True),
    Way(
        "torchao int8 dynamic", BF16, "inductor", tolerance=0.3, freeze=True, needs=("torchao",),
        quantize=_torchao("torchao.quantization.Int8DynamicActivationInt8WeightConfig"),
    ),
    Way(
        "torchao int8 weight-only", BF16, "inductor", tolerance=0.3, freeze=True, needs=("torchao",),
        quantize=_torchao("torchao.quantization.Int8WeightOnlyConfig"),
    ),
    Way(
        "torchao int4 weight-only", BF16, "inductor", tolerance=0.7, freeze=True, needs=("torchao",),
        quantize=_torchao("torchao.prototype.quantization.int4.PrototypeInt4WeightOnlyConfig", group_size=128),
    ),
    _llama("BF16", tolerance=0.05),
    _llama("F16", tolerance=0.05),
    _llama("Q8_0", tolerance=0.1, default=True),
    _llama("Q4_0", tolerance=0.5, default=True),
    _llama("TQ2_0"),
    _llama("Q1_0", default=True),
    _llama("IQ1_S"),
    Way("bwla, eager", FP32, "eager", "packed", reference=""),
    Way("bwla", FP32, "bwla", "packed", reference="bwla, eager", tolerance=0.05),
    Way(
        "bwla, int8 cache", FP32, "bwla", "packed", reference="bwla, eager", tolerance=0.3, int8_cache=True,
        default=False,
    ),
)  # fmt: skip
"""In the order of the tables. `bwla` is held against the packed model's own eager logits: codes at a rounding boundary
may fall to either side when sums are ordered otherwise."""

DEFAULT_WAYS = tuple(way.name for way in WAYS if way.default)


def named(name: str) -> Way:
    """Return the way of this name. Raises ResultsError where there is none."""
    known = {way.name: way for way in WAYS}
    if name not in known:
        raise ResultsError(f"no way is called {name!r}; there are: {', '.join(known)}")
    return known[name]


def ways(names: tuple[str, ...] = ()) -> list[Way]:
    """Return ways by name with what they are held against, the default ones for none; in the order of the tables.

    Raises ResultsError for a name that there is not.
    """
    chosen = [named(name) for name in names or DEFAULT_WAYS]
    references = [named(way.reference) for way in chosen if way.reference]
    return [way for way in WAYS if way in chosen or way in references]

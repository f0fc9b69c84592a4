"""What the models are: folders of a float model and of its packed twin, made of a config where there is none."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.random_model import random_model
from bwla_compiler import api
from bwla_compiler.checkpoint.files import write_json
from bwla_compiler.checkpoint.hf import attach
from bwla_compiler.checkpoint.source import INDEX
from bwla_compiler.demo import demo_path, is_demo
from bwla_compiler.errors import ModelError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import block_of
from bwla_compiler.numerics.bits import Bits
from bwla_compiler.recipe import Recipe, load_recipe
from bwla_compiler.tokens import random_tokens

Progress = Callable[[str, int, int], None]

QUICK_FIT = {
    "tuning.steps": 0,
    "transform.iterations": 0,
    "signs.sweeps": 1,
    "psp.iterations": 1,
    "smoothing.exponent": 0.0,
    "calibration.sequences": 2,
    "calibration.length": 64,
}
"""Fits left out or cut short: planes, scales, pairs and transforms are stored and run as the recipe's are, but badly
chosen. For what is timed alone."""

PACKED = "quantization_config"


@dataclass(frozen=True)
class Subject:
    """A float folder (None where only packed weights are there) and a packed one, with the label of the tables."""

    label: str
    floats: str | None
    packed: str
    vocab_size: int

    def ids(self, n_tokens: int) -> torch.Tensor:
        """Return random tokens [1, n_tokens] int64."""
        return random_tokens(self.vocab_size, sequences=1, length=n_tokens, seed=0)

    def folder(self, source: str) -> str | None:
        """Return the folder of "float" or "packed"."""
        return self.floats if source == "float" else self.packed


def make_subject(
    source: str, *, work: Path, floats: str = "", layers: int = 0, vocab: int = 0, alike: bool = False,
    progress: Progress | None = None,
) -> Subject:  # fmt: skip
    """Return what is to be timed of a source, with what had to be made in the folder `work`.

    source: a folder, float or packed, demo: or demo:outliers, or a config.json, whose weights are then drawn at random.
    floats: the original of a packed folder. layers, vocab: fewer of a config's, 0 for as many as it says. alike: all
    blocks of a config have the same weights, of which one block is quantized. Packed twins are quantized by the default
    recipe with QUICK_FIT. Raises ModelError, CheckpointError.
    """
    path = Path(source)
    if is_demo(source):
        label, floats = source, str(demo_path(source, progress=progress))
    elif path.suffix == ".json":
        floats = str(work / "float")
        label = random_model(path, work / "float", layers=layers, vocab=vocab, alike=alike, progress=progress)
    else:
        label = path.name or source
        if _is_packed(path):
            return Subject(label, floats or None, source, _vocabulary(source))
        floats = source
    if (layers or alike) and path.suffix != ".json":
        raise ModelError(f"{source}: blocks can be left out, or be alike, of a config alone; give its config.json")
    packed = work / "packed"
    if alike:
        _quantize_one_block(Path(floats), work, packed, progress)
    else:
        api.quantize_to(floats, packed, recipe=quick_recipe(), calibration="random", progress=progress)
    return Subject(label, floats, str(packed), _vocabulary(floats))


def _quantize_one_block(floats: Path, work: Path, packed: Path, progress: Progress | None) -> None:
    """Write the packed twin of a model whose blocks are alike: copies of its first one, which alone is quantized."""
    _first_block(floats, work / "float-one")
    api.quantize_to(work / "float-one", work / "one", recipe=quick_recipe(), calibration="random", progress=progress)
    model: Any = api.load(str(work / "one")).model
    found, whole = model.config.quantization_config, _config(floats)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 1)
    for i in range(1, whole["num_hidden_layers"]):
        block = copy.deepcopy(blocks[0])
        module: Any
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
        blocks.append(block)
    for name in ("num_hidden_layers", "layer_types"):
        if name in whole:
            setattr(model.config, name, whole[name])
    attach(model, recipe=quick_recipe(), plan=Plan.from_json(json.dumps(found.plan)), bits=Bits(**found.true_bits))
    model.save_pretrained(packed)


def _first_block(floats: Path, folder: Path) -> None:
    """Write a model of another's first block and of what stands outside of its blocks, from the same files."""
    config, index = _config(floats), json.loads((floats / INDEX).read_text("utf-8"))["weight_map"]
    kept = {name: file for name, file in index.items() if block_of(name).endswith(".0") or not block_of(name)}
    folder.mkdir()
    for file in set(kept.values()):
        shutil.copy(floats / file, folder / file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": kept})
    kinds = {"layer_types": config["layer_types"][:1]} if config.get("layer_types") else {}
    write_json(folder / "config.json", config | kinds | {"num_hidden_layers": 1})


def quick_recipe(name: str = "bwla-w1a6") -> Recipe:
    """Return a recipe with QUICK_FIT."""
    return load_recipe(name, QUICK_FIT)


def _config(folder: str | Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: has no readable config.json; give a model folder, a config.json, or demo:"
        ) from error
    return found


def _is_packed(folder: Path) -> bool:
    return PACKED in _config(folder)


def _vocabulary(folder: str) -> int:
    config = _config(folder)
    return int(config.get("vocab_size") or config.get("text_config", {})["vocab_size"])

"""Folders of models with random weights, made of a config alone, of any size: a shard is in memory at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bwla_compiler.checkpoint.files import write_json, write_tensors
from bwla_compiler.checkpoint.source import INDEX
from bwla_compiler.errors import ModelError
from bwla_compiler.graph.planner import block_of

Progress = Callable[[str, int, int], None]

POOL = 1 << 24
"""Normal numbers that all weights are cut from, each from a place of its own."""


INTO_RESIDUAL = ("o_proj", "down_proj", "c_proj", "out_proj", "fc2")
"""Linears that write the residual stream: smaller by sqrt(2 layers), as GPT-2 begins with them (Radford et al., 2019).
With weights of one size the last blocks would drown the first, and rounding any of them would change every logit."""


def random_model(
    config_file: Path, folder: Path, *, layers: int = 0, vocab: int = 0, alike: bool = False,
    progress: Progress | None = None,
) -> str:  # fmt: skip
    """Write a model of a config with random weights in bfloat16, and return its label.

    layers: so many, 0 for the config's own; vocab: so small a vocabulary, 0 for the config's. alike: all blocks have
    the same weights. Raises ModelError.
    """
    try:
        config = AutoConfig.from_pretrained(config_file)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{config_file}: does not describe a model: {str(error).splitlines()[0]}") from error
    label = config_file.parent.name if config_file.stem == "config" else config_file.stem
    whole = config.num_hidden_layers
    if layers and layers != whole:
        kinds = getattr(config, "layer_types", None)
        config.num_hidden_layers = layers
        if kinds:
            config.layer_types = [kinds[i % whole] for i in range(layers)]
        label += f", {layers} of {whole} layers"
    if vocab and vocab < config.vocab_size:
        config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = vocab, None, 0, 1
        label += f", vocabulary {vocab}"
    write_random(config, folder, alike=alike, progress=progress)
    return f"{label}, random weights" + (", all blocks alike" if alike else "")


def write_random(
    config: Any, folder: Path, *, seed: int = 0, alike: bool = False, progress: Progress | None = None
) -> None:
    """Write a bfloat16 model of normal weights, gains of 1 and biases of 0, a shard a block; see `random_model`."""
    generator = torch.Generator().manual_seed(seed)
    spread = getattr(config, "initializer_range", 0.02)
    pool = (torch.randn(POOL, generator=generator) * spread).bfloat16()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        shards.setdefault(block_of(name), {})[name] = parameter.shape
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    for i, shapes in enumerate(shards.values()):
        if progress is not None:
            progress("writing random weights", i, len(shards))
        if alike:
            generator.manual_seed(seed)
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        drawn = {name: _drawn(name, shape, pool, generator) for name, shape in shapes.items()}
        depth = (2 * config.num_hidden_layers) ** (1.0 if alike else 0.5)  # what is alike adds up in one direction
        smaller = {name: w / depth for name, w in drawn.items() if name.split(".")[-2] in INTO_RESIDUAL and w.dim() > 1}
        write_tensors(folder / file, drawn | smaller)
        index |= dict.fromkeys(shapes, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": index})
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(folder)


def _drawn(name: str, shape: torch.Size, pool: Tensor, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape, dtype=pool.dtype) if name.endswith("bias") else torch.ones(shape, dtype=pool.dtype)
    start = int(torch.randint(POOL, (1,), generator=generator))
    times = -(-(start + shape.numel()) // POOL)
    return pool.repeat(times)[start : start + shape.numel()].reshape(shape)

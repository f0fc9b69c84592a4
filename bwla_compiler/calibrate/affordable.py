"""What tuning takes of memory, and what of it the machine can afford."""

import dataclasses
from collections import Counter

from torch import nn

from bwla_compiler.graph.planner import block_of
from bwla_compiler.memory import memory_bytes
from bwla_compiler.recipe import Tuning

PACK_BYTES, LATENT_BYTES, HEAD_BYTES = 0.5, 2.0, 8.0
"""For each weight: the pack, twice; of the signs that learn at once; of the head, its floats twice."""


def affordable(tuning: Tuning, model: nn.Module) -> tuple[Tuning, str]:
    """Return the tuning that fits into half of the machine's memory, and what was changed for that, "" for nothing.

    model: not packed yet; its values are not read. Where the signs of the whole model cannot learn at once, those of
    one block do in turn; where even the pack does not fit beside its copy, nothing is tuned (steps 0).
    """
    if tuning.steps == 0:
        return tuning, ""
    wanted, room = tuning_bytes(tuning, model), memory_bytes() // 2
    if wanted <= room:
        return tuning, ""
    in_turn = dataclasses.replace(tuning, signs_at_once="block")
    choices = {
        "signs learn one block at a time": in_turn,
        "signs do not learn": dataclasses.replace(in_turn, signs=0.0),
        "nothing is tuned": dataclasses.replace(in_turn, steps=0),
    }
    what = next(what for what, fewer in choices.items() if tuning_bytes(fewer, model) <= room)
    reason = f"tuning as asked for takes {wanted / 1e9:.2g} GB, and half of the memory is {room / 1e9:.2g} GB"
    return choices[what], f"{what}: {reason}"


def tuning_bytes(tuning: Tuning, model: nn.Module) -> int:
    """Return the bytes that tuning takes beside the float model and one step's activations."""
    if tuning.steps == 0:
        return 0
    by_block: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            by_block[block_of(name)] += parameter.numel()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    n_bytes = PACK_BYTES * by_block.total() + (0 if head is None else HEAD_BYTES * head.weight.numel())
    if tuning.signs > 0:
        in_turn = (n for block, n in by_block.items() if block) if tuning.signs_at_once == "block" else ()
        n_bytes += LATENT_BYTES * max(in_turn, default=by_block.total())
    return int(n_bytes)

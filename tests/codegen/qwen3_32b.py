"""The kernels that the plan of the real Qwen3-32B runs on a GPU, by the specs that it gives each layer."""

import dataclasses

from bwla_compiler.codegen.triton_aot import GpuTarget
from bwla_compiler.codegen.triton_gemv import emit_linear_gemv
from bwla_compiler.codegen.triton_int8 import emit_int8_linear, int8_tile
from bwla_compiler.codegen.triton_linear import emit_linear_dot, emit_linear_sum, emit_low_rank
from bwla_compiler.codegen.triton_spec import Emitted, Int8Kernel, LinearKernel, PrologueKernel
from bwla_compiler.codegen.triton_tiles import device_for, is_decode, ranked
from bwla_compiler.emit import linear_kernel, prologue_kernels
from bwla_compiler.spec import LinearSpec, TransformSpec

SIZES = {
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
"""Of its config, the number of layers left out: they are alike."""

Q = LinearSpec(5120, (8192,), rank=80)
KV = LinearSpec(5120, (1024, 1024), rank=26)
O = LinearSpec(8192, (5120,), rank=80, transform=TransformSpec("kronecker", 64, 128, left=True, scaled=True))  # noqa: E741
UP = LinearSpec(5120, (25600, 25600), rank=80)
DOWN = LinearSpec(25600, (5120,), rank=80, transform=TransformSpec("kronecker", 50, 512, True, True, True, True))
SPECS = (Q, KV, O, UP, DOWN)
"""Of one layer by bwla-w1a6."""


def qkv(target: GpuTarget, tokens: int) -> LinearKernel:
    """Return the one launch of q, k and v, whose ranks differ."""
    q = linear_kernel(Q, target, tokens)
    three = {"out_features": (8192, 1024, 1024), "ranks": (80, 26, 26)}
    merged = dataclasses.replace(q, **three, biases=(False,) * 3, residuals=(False,) * 3)
    smallest = 8 if target.backend == "cuda" else 16
    best = ranked(merged, tokens, device_for([str(target)]), smallest=smallest)[0]
    return dataclasses.replace(merged, tile=best)


def launched(kernel: LinearKernel, tokens: int) -> list[Emitted]:
    """Return the kernels of one call."""
    found = [emit_low_rank(kernel)] if kernel.ranked and not kernel.mixed_before else []
    if is_decode(kernel, tokens):
        return [*found, emit_linear_gemv(kernel)]
    return [*found, emit_linear_dot(kernel), *([emit_linear_sum(kernel)] if kernel.tile.parts > 1 else [])]


def linears(target: GpuTarget, tokens: int) -> list[Emitted]:
    """Return the kernels of a layer's linears for so many tokens; o and down add the residual."""
    kernels = [qkv(target, tokens), linear_kernel(UP, target, tokens)]
    for spec in (O, DOWN):
        kernels.append(dataclasses.replace(linear_kernel(spec, target, tokens), residuals=(True,)))
    return list(dict.fromkeys(emitted for kernel in kernels for emitted in launched(kernel, tokens)))


def prologues(target: GpuTarget, tokens: int) -> list[Emitted]:
    """Return the kernels before a layer's linears of so many tokens, low-rank pairs' first half among them."""
    norm = PrologueKernel(5120, "rms_norm", activation_bits=6, precision=target.precision)
    turn = dataclasses.replace(norm, columns=8192, kind="none", transform=O.transform)
    gate = dataclasses.replace(norm, columns=25600, kind="silu_mul", transform=DOWN.transform)
    found = prologue_kernels(norm, qkv(target, tokens), tokens)
    for prologue, spec in ((norm, UP), (turn, O), (gate, DOWN)):
        found += prologue_kernels(prologue, linear_kernel(spec, target, tokens), tokens)
    return list(dict.fromkeys(found))


def heads(target: GpuTarget) -> list[Emitted]:
    """Return the kernels of the int8 head, for one token and for a few."""
    return [emit_int8_linear(Int8Kernel(5120, 151936, False, int8_tile(n), target.precision)) for n in (1, 8)]

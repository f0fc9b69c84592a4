"""What a compiled kernel must keep to: no spills, shared memory that there is, the right units, few instructions."""

from bwla_compiler.codegen import triton_module
from bwla_compiler.codegen.triton_aot import Compiled

DECODE_BUDGET, SKINNY_BUDGET = 0.75, 1.25
"""Instructions a weight of the decode kernel, and of the matrix kernel for at most 8 tokens. An H100 issues about 1.2
in the time in which its memory delivers a weight of 1 bit."""

SKINNY_TOKENS = 8
"""Tokens of a tile up to which the second budget holds: twice as many take twice the products."""

TOGETHER = 4
"""Warps from which on newer units multiply for four warps together; fewer keep to the products of single warps."""

SMALLEST = 40
"""Instructions below which a kernel is a stub that traps: so the compiler answers where tensor memory overflows."""


def violations(compiled: Compiled) -> list[str]:
    """Return what a kernel breaks, in words; empty where it keeps to all."""
    r, emitted, target = compiled.resources, compiled.emitted, compiled.target
    found = [f"{r.stack_bytes} bytes of stack"] if r.stack_bytes else []
    found += [f"{r.spills} spills to local memory"] if r.spills else []
    if r.shared_bytes > target.shared_limit:
        found += [f"{r.shared_bytes} bytes of shared memory, of {target.shared_limit}"]
    found += [f"a stub of {r.instructions} instructions"] if r.instructions < SMALLEST else []
    found += ["inline assembly on several elements at once"] if r.packed_assembly else []
    wanted = required_units(compiled)
    if wanted and not any(unit.startswith(wanted) for unit in r.units):
        found += [f"none of {', '.join(wanted)} in its code"]
    budget = instruction_budget(compiled)
    if budget is not None and r.per_weight is None:
        found += ["its products do not tell how often its loop runs"]
    elif budget is not None and r.per_weight is not None and r.per_weight > budget:
        found += [f"{r.per_weight:.2f} instructions a weight, of {budget}: {emitted.title}"]
    return found


def required_units(compiled: Compiled) -> tuple[str, ...]:
    """Return the instructions of which a CUDA kernel must have one, none where nothing is required."""
    emitted, target = compiled.emitted, compiled.target
    if target.backend != "cuda":
        return ()
    if emitted.name == "linear_gemv":
        return ("IDP.4A",)
    if emitted.name != "linear_dot" or dict(emitted.parameters)["codes"] != "*i8" or emitted.work is None:
        return ()
    capability = int(target.architecture)
    if capability < 80:
        return ("IMMA",)
    if emitted.warps < TOGETHER:
        return ("IMMA.16832",)
    if capability == 90:
        return ("IGMMA",)
    return ("UTCIMMA",) if capability in (100, 103) and _newest() else ("IMMA",)


def _newest() -> bool:
    """Whether this Triton multiplies int8 in tensor memory: 3.6 does not."""
    major, minor = map(int, triton_module.require_triton().__version__.split(".")[:2])
    return (major, minor) >= (3, 9)


def instruction_budget(compiled: Compiled) -> float | None:
    """Return the instructions a weight that a CUDA kernel may take, None where there is no budget.

    Weights with scales of 128 columns are left out: their sums are scaled in every step.
    """
    emitted = compiled.emitted
    if compiled.target.backend != "cuda" or emitted.work is None or dict(emitted.parameters)["codes"] == "*fp32":
        return None
    if emitted.name == "linear_gemv":
        return DECODE_BUDGET
    return SKINNY_BUDGET if emitted.work.tokens <= SKINNY_TOKENS else None

"""Tiles that a kernel of 1-bit linears may have, in the order of their modelled time on a device.

Modelled, never measured: the longest of what memory, cache, instruction issue, matrix units and latency take, with
the units that a grid leaves idle. Constants are of current data-centre GPUs; where a GPU is at hand the first few are
timed (`runtime.triton_tuner`), so that the model need only put good tiles in front.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bwla_compiler.codegen.triton_spec import GEMV_TOKENS, GROUP, LinearKernel, Tile
from bwla_compiler.cost.devices import DEVICES, Device
from bwla_compiler.cost.factors import power_of_two

CLOCK = 1.7e9
"""Cycles a second."""

ISSUE = 4 * 32
"""Threads of one unit that execute an instruction in a cycle."""

L2_RATIO = 2.0
"""Bytes a second from the shared cache, over those from memory."""

LATENCY = 8e-7
"""Seconds of a read from a busy memory: bytes in flight over this bound the bandwidth."""

LAUNCH = 2e-6
"""Seconds of one more kernel in a CUDA graph."""

REGISTERS, SHARED, WARPS = 65536, 200_000, 48
"""Of a unit: registers, bytes of shared memory, warps that are resident at once."""

DECODE_COST, EXPAND_COST, WIDE_COST = 0.66, 0.75, 1.5
"""Instructions a weight, counted in SASS: of the decode kernel; of the matrix kernel before its products, where warps
multiply alone, and where four do so together (signs then go through shared layouts)."""

SMALLEST_PART = 4
"""Groups of 128 channels that a program gets at least."""

LARGEST_SHARE = 8
"""Programs that may share the channels of a tile."""


def tokens_bucket(tokens: int) -> int:
    """Return the number of tokens that a tile is chosen for: the next of 1, 8, 16, 32, 64 and so on."""
    return 1 if tokens <= GEMV_TOKENS else power_of_two(tokens, least=8)


def is_decode(spec: LinearKernel, tokens: int) -> bool:
    """Whether the decode kernel serves so many tokens; its dot product of bytes is CUDA's."""
    return tokens <= GEMV_TOKENS and spec.rounds and spec.decodes


def candidates(spec: LinearKernel, tokens: int, *, smallest: int = 8) -> list[Tile]:
    """Return the tiles to choose from; the tile of `spec` is not looked at.

    smallest: tokens of the narrowest product of the device's matrix units.
    """
    if is_decode(spec, tokens):
        return list(_decode_tiles(spec))
    if not spec.rounds:
        wide = 16 if tokens <= 16 else 32
        return [replace(Tile(64, wide, 4, 2), parts=parts) for parts in _parts(spec, tokens)]
    found = []
    for rows, wide, warps in _dot_shapes(spec, tokens, smallest):
        stages = 4 if wide <= 16 else 3
        found += [Tile(rows, wide, warps, stages, parts=parts) for parts in _parts(spec, tokens)]
    return found


def _decode_tiles(spec: LinearKernel) -> Iterator[Tile]:
    """Yield tiles whose threads have 4 or 8 rows each, with groups side by side that leave none over where they can.

    Deep pipelines only where 8 rows share their cost: with 4 it takes the kernel beyond its budget.
    """
    splits = [n for n in (8, 16, 32) if spec.groups % n == 0] or [8]
    for rows in (16, 32, 64):
        for split in splits:
            for lanes, stages in ((4, 2), (8, 2), (8, 4)):
                warps = rows * split // (32 * lanes)
                if 1 <= warps <= 8:
                    yield Tile(rows, 1, warps, stages, split=split)


def _dot_shapes(spec: LinearKernel, tokens: int, smallest: int) -> list[tuple[int, int, int]]:
    """Return (rows, tokens, warps). Two warps keep products of few tokens off the units that need four at once."""
    heavy = spec.planes > 1 or spec.grouped
    if tokens <= 16:
        wide = max(smallest, 8 if tokens <= 8 else 16)
        return [(64, wide, 2), (32, wide, 2), (128, wide, 2)]
    if tokens <= 32:
        return [(64, 32, 2), (128, 32, 8)] if heavy else [(128, 32, 2), (64, 32, 2), (128, 32, 8)]
    if tokens <= 64:
        return [(64, 64, 4), (128, 64, 8)]
    if heavy:
        return [(128, 64, 8), (64, 64, 4)]
    found = [(128, 128, 8), (64, 128, 4)]
    # 128 x 256 spills with a residual to add; with low-rank pairs triton 3.6 makes a stub that traps of it on sm_100
    return found if tokens <= 128 or any(spec.residuals) or spec.ranked else [*found, (128, 256, 8)]


def _parts(spec: LinearKernel, tokens: int) -> list[int]:
    """Return numbers of programs that may share the channels: one, and up to 8 where tokens are few."""
    if tokens > 64:
        return [1]
    return [n for n in (1, 2, 4, LARGEST_SHARE) if n == 1 or spec.groups >= n * SMALLEST_PART]


# ---------------------------------------------------------------- modelled time


@dataclass(frozen=True)
class _Program:
    """What one program does: bytes that it reads a step, steps, instructions a thread, and how many fit on a unit."""

    step_bytes: int
    steps: int
    instructions: float
    resident: int


def _decode_program(spec: LinearKernel, tile: Tile) -> _Program:
    steps = -(-spec.groups // tile.split)
    lanes = tile.rows * tile.split // (32 * tile.warps)
    each = DECODE_COST + 0.3 / lanes  # a thread's rows share its reads of the codes
    instructions = 100 + each * spec.planes * lanes * GROUP * steps
    registers = 40 + 10 * lanes * spec.planes
    resident = min(WARPS // tile.warps, REGISTERS // (registers * 32 * tile.warps))
    return _Program(tile.rows * tile.split * 16 * spec.planes, steps, instructions, max(1, resident))


def _dot_program(spec: LinearKernel, tile: Tile) -> _Program:
    own = tile.rows / (32 * tile.warps)  # rows a thread
    multiply = (EXPAND_COST + 0.1 * tile.tokens / 8) if tile.warps < 4 else (WIDE_COST + 0.03 * tile.tokens / 8)
    each = multiply + (3 * tile.tokens / GROUP if spec.grouped else 0.0)
    instructions = 200 + each * spec.planes * own * GROUP * spec.part_groups
    registers = 80 + tile.rows * tile.tokens * (spec.planes + spec.grouped) // (32 * tile.warps)
    step = 16 * tile.rows * spec.planes + (GROUP if spec.rounds else 4 * GROUP) * tile.tokens
    fits = (WARPS // tile.warps, REGISTERS // (registers * 32 * tile.warps), SHARED // (step * tile.stages))
    return _Program(step, spec.part_groups, instructions, max(1, min(fits)))


def modelled_seconds(spec: LinearKernel, tokens: int, device: Device) -> float:
    """Return the modelled time of a launch, with the second one where channels are shared."""
    tile = spec.tile
    decode = is_decode(spec, tokens)
    program = _decode_program(spec, tile) if decode else _dot_program(spec, tile)
    blocks = -(-tokens // tile.tokens)
    programs = spec.first_tiles(spec.out_features, tile.rows)[-1] * blocks * tile.parts
    rounds = math.ceil(programs / device.units)
    at_once = min(program.resident, rounds) * min(1.0, programs / device.units)
    weights = spec.planes * spec.groups * GROUP * sum(spec.out_features)
    memory = weights / 8 / device.bytes_per_second
    cache = programs * program.steps * program.step_bytes / (L2_RATIO * device.bytes_per_second)
    issue = rounds * program.instructions * tile.warps * 32 / (ISSUE * CLOCK)
    matrix = 0.0 if decode else 2.0 * weights * blocks * tile.tokens / (0.6 * device.int8_ops_per_second)
    in_flight = device.units * at_once * program.step_bytes * max(1, tile.stages - 1)
    latency = programs * program.steps * program.step_bytes * LATENCY / in_flight
    seconds = max(memory, cache, issue, matrix, latency)
    if tile.parts == 1:
        return seconds
    sums = 4 * tokens * sum(spec.out_features) * tile.parts * (1 if spec.grouped else spec.planes)
    return seconds + LAUNCH + 2 * sums / (L2_RATIO * device.bytes_per_second)


def ranked(spec: LinearKernel, tokens: int, device: Device, *, smallest: int = 8) -> list[Tile]:
    """Return the candidates, the one of least modelled time first."""
    bucket = tokens_bucket(tokens)
    found = candidates(spec, bucket, smallest=smallest)
    return sorted(found, key=lambda tile: modelled_seconds(replace(spec, tile=tile), bucket, device))


def device_for(names: Sequence[str]) -> Device:
    """Return the device of the cost model that one of these words names best, an H100 where none does."""
    text = " ".join(names).lower()
    for word, name in _WORDS.items():
        if word in text:
            return DEVICES[name]
    return DEVICES["h100-sxm"]


_WORDS = {
    "h200": "h200-sxm", "h100": "h100-sxm", "b200": "b200-sxm", "a100": "a100-sxm", "4090": "rtx-4090",
    "mi300": "mi300x", "gfx94": "mi300x", "gfx95": "mi300x", "cuda:80": "a100-sxm", "cuda:86": "rtx-4090",
    "cuda:89": "rtx-4090", "cuda:100": "b200-sxm", "cuda:103": "b200-sxm",
}  # fmt: skip

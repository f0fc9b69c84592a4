"""The Triton kernels of heads in 4-bit codes with a scale a group of columns, and float inputs."""

from bwla_compiler.codegen.triton_ends import emit_end
from bwla_compiler.codegen.triton_spec import Emitted, Int4Kernel, Tile

_ONE = '''

@triton.jit
def int4_gemv({names}):
    """{title}."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    live_row = row < OUTPUTS
    sums = tl.zeros((ROWS, SPLIT), tl.float32)
    for start in tl.range(0, BYTES, SPLIT, num_stages=STAGES):
        k = start + tl.arange(0, SPLIT)
        live = k < BYTES
        both = live_row[:, None] & live[None, :]
        even = tl.load(x + token * COLUMNS + 2 * k, mask=live, other=0.0).to(tl.float32)
        odd = tl.load(x + token * COLUMNS + 2 * k + 1, mask=2 * k + 1 < COLUMNS, other=0.0).to(tl.float32)
        w = tl.load(codes + row[:, None] * BYTES + k[None, :], mask=both, other=0).to(tl.int32)
        s = tl.load(scale + row[:, None] * GROUPS + (2 * k // GROUP)[None, :], mask=both, other=0.0)
        sums += (((w & 15) - 8).to(tl.float32) * even[None, :] + ((w >> 4) - 8).to(tl.float32) * odd[None, :]) * s
    total = tl.sum(sums, 1)
{bias}    tl.store(y + token * OUTPUTS + row, total.to(y.dtype.element_ty), mask=live_row)
'''

_MANY = '''

@triton.jit(do_not_specialize=["tokens"])
def int4_dot({names}):
    """{title}."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live_row = row < OUTPUTS
    live_token = token < tokens
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for group in tl.range(0, GROUPS, num_stages=STAGES):
        k = group * (GROUP // 2) + tl.arange(0, GROUP // 2)
        at = x + token[:, None] * COLUMNS + 2 * k[None, :]
        even = tl.load(at, mask=live_token[:, None] & (k < BYTES)[None, :], other=0.0).to(tl.float32)
        odd = tl.load(at + 1, mask=live_token[:, None] & (2 * k + 1 < COLUMNS)[None, :], other=0.0).to(tl.float32)
        there = live_row[:, None] & (k < BYTES)[None, :]
        w = tl.load(codes + row[:, None] * BYTES + k[None, :], mask=there, other=0).to(tl.int32)
        part = product(((w & 15) - 8).to(tl.float32), tl.trans(even), tl.zeros((ROWS, TOKENS), tl.float32))
        part = product(((w >> 4) - 8).to(tl.float32), tl.trans(odd), part)
        total += part * tl.load(scale + row * GROUPS + group, mask=live_row, other=0.0)[:, None]
{bias}    at = token[None, :] * OUTPUTS + row[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=live_row[:, None] & live_token[None, :])
'''


def int4_tile(tokens: int) -> Tile:
    """Return the tile for a number of tokens: one at a time by sums, more by float products a group of columns each."""
    if tokens == 1:
        return Tile(rows=8, tokens=1, warps=4, stages=3, split=256)
    return Tile(rows=64, tokens=16 if tokens <= 16 else 32, warps=4, stages=3)


def emit_int4_linear(spec: Int4Kernel, *, activations: str = "*x") -> Emitted:
    """Return the kernel `int4_gemv`, or `int4_dot` where the tile has several tokens. Grid (tiles, blocks of tokens).

    x [tokens, columns] of the activations' type; codes uint8 [out, ceil(columns / 2)], column 2k in the low half of
    byte k; scale [out, groups] and bias [out] float32; y [tokens, out] of the model's type; tokens: how many.
    activations: "*fp32" where x was turned before.
    """
    outputs, columns, tile = spec.out_features, spec.columns, spec.tile
    one = tile.tokens == 1
    title = f"int4 linear {columns} -> {outputs} by {spec.group_size}: tiles of {tile.rows} x {tile.tokens} tokens"
    numbers = {"COLUMNS": columns, "BYTES": -(-columns // 2), "GROUP": spec.group_size}
    numbers |= {"GROUPS": -(-columns // spec.group_size), "OUTPUTS": outputs, "ROWS": tile.rows, "STAGES": tile.stages}
    numbers |= {"SPLIT": tile.split} if one else {"TOKENS": tile.tokens}
    text = ("int4_gemv", _ONE) if one else ("int4_dot", _MANY)
    return emit_end(spec, text, title, numbers, codes="*u8", activations=activations)

"""The Triton kernels of linears of int8 weights and float inputs, which heads are: y = (x codes^T) * scale + bias."""

from bwla_compiler.codegen.triton_ends import emit_end
from bwla_compiler.codegen.triton_spec import Emitted, Int8Kernel, Tile

_ONE = '''

@triton.jit
def int8_gemv({names}):
    """{title}."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    live_row = row < OUTPUTS
    sums = tl.zeros((ROWS, SPLIT), tl.float32)
    for start in tl.range(0, COLUMNS, SPLIT, num_stages=STAGES):
        k = start + tl.arange(0, SPLIT)
        live = k < COLUMNS
        v = tl.load(x + token * COLUMNS + k, mask=live, other=0.0).to(tl.float32)
        w = tl.load(codes + row[:, None] * COLUMNS + k[None, :], mask=live_row[:, None] & live[None, :], other=0)
        sums += w.to(tl.float32) * v[None, :]
    total = tl.sum(sums, 1) * tl.load(scale + row, mask=live_row, other=0.0)
{bias}    tl.store(y + token * OUTPUTS + row, total.to(y.dtype.element_ty), mask=live_row)
'''

_MANY = '''

@triton.jit(do_not_specialize=["tokens"])
def int8_dot({names}):
    """{title}."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live_row = row < OUTPUTS
    live_token = token < tokens
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, COLUMNS, SPLIT, num_stages=STAGES):
        k = start + tl.arange(0, SPLIT)
        live = k < COLUMNS
        v = tl.load(x + token[:, None] * COLUMNS + k[None, :], mask=live_token[:, None] & live[None, :], other=0.0)
        w = tl.load(codes + row[:, None] * COLUMNS + k[None, :], mask=live_row[:, None] & live[None, :], other=0)
        total = product(w.to(tl.float32), tl.trans(v.to(tl.float32)), total)
    total = total * tl.load(scale + row, mask=live_row, other=0.0)[:, None]
{bias}    at = token[None, :] * OUTPUTS + row[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=live_row[:, None] & live_token[None, :])
'''


def int8_tile(tokens: int) -> Tile:
    """Return the tile for a number of tokens: one at a time by sums, more by float products."""
    if tokens == 1:
        return Tile(rows=8, tokens=1, warps=4, stages=3, split=512)
    if tokens <= 32:
        return Tile(rows=64, tokens=16 if tokens <= 16 else 32, warps=4, stages=3, split=64)
    return Tile(rows=128, tokens=64, warps=8, stages=3, split=32)


def emit_int8_linear(spec: Int8Kernel, *, activations: str = "*x") -> Emitted:
    """Return the kernel `int8_gemv`, or `int8_dot` where the tile has several tokens. Grid (tiles, blocks of tokens).

    x [tokens, columns] of the activations' type; codes int8 [out, columns]; scale [out] and bias [out] float32;
    y [tokens, out] of the model's type; tokens: how many. activations: "*fp32" where x was turned before.
    """
    outputs, tile = spec.out_features, spec.tile
    one = tile.tokens == 1
    title = f"int8 linear {spec.columns} -> {outputs}: tiles of {tile.rows} x {tile.tokens} tokens"
    numbers = {"COLUMNS": spec.columns, "OUTPUTS": outputs, "ROWS": tile.rows, "SPLIT": tile.split}
    numbers |= {"STAGES": tile.stages} | ({} if one else {"TOKENS": tile.tokens})
    text = ("int8_gemv", _ONE) if one else ("int8_dot", _MANY)
    return emit_end(spec, text, title, numbers, codes="*i8", activations=activations)

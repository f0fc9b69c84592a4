"""The Triton kernel of 1-bit linears for one token at a time: four channels a dp4a, no matrix units, no atomics.

With S the sum of the codes whose sign is +1 and X the sum of all, B q = 2 S - X. Masked by bit p of each byte, a word
gives 2^p at four channels; times 2^(7 - p) each plane of bits adds up to 128 S in int32, exact up to 132 000 columns.
"""

from bwla_compiler.codegen.triton_linear import choice, constants, describe, group_of, member_parameters, more_parts
from bwla_compiler.codegen.triton_spec import GROUP, Emitted, LinearKernel, Work
from bwla_compiler.codegen.triton_text import head, indented

_DP4A = {
    True: '''

@triton.jit
def dp4a(a, b, c):
    """Return c + the sum over bytes of a (unsigned) times b (signed)."""
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )
''',
    False: '''

@triton.jit
def dp4a(a, b, c):
    """Return c + the sum over bytes of a (unsigned) times b (signed)."""
    for byte in tl.static_range(4):
        c += ((a >> (8 * byte)) & 0xFF) * ((b << (24 - 8 * byte)) >> 24)
    return c
''',
}

_SPLIT4 = '''

@triton.jit
def split4(words, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Return the four words of [FIRST, SECOND, 4] as four [FIRST, SECOND]."""
    even, odd = tl.split(tl.reshape(words, (FIRST, SECOND, 2, 2)))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    return c0, c1, c2, c3


@triton.jit
def four(w0, w1, w2, w3, x0, x1, x2, x3, c):
    """Return c + the sums over 16 channels: bytes of w times bytes of x."""
    return dp4a(w3, x3, dp4a(w2, x2, dp4a(w1, x1, dp4a(w0, x0, c))))
'''

_GEMV = '''

@triton.jit
def linear_gemv({names}):
    """{title}."""
    tile = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
{choice}    row = (tile - first) * ROWS + tl.arange(0, ROWS)
    word = tl.arange(0, 4)
    live_row = row < outputs
    codes = (codes + token * STRIDE).to(tl.pointer_type(tl.int32))
{zeros}    for start in tl.range(0, GROUPS, SPLIT, num_stages=STAGES):
        group = start + tl.arange(0, SPLIT)
{live}{loads}        for bit in tl.static_range(8):
            x_at = group[:, None, None] * 32 + bit * 4 + word[None, None, :]
            x0, x1, x2, x3 = split4(tl.load(codes + x_at{live_codes}), SPLIT, 1)
{sum_x}            x0, x1 = tl.broadcast_to(x0, (SPLIT, ROWS)), tl.broadcast_to(x1, (SPLIT, ROWS))
            x2, x3 = tl.broadcast_to(x2, (SPLIT, ROWS)), tl.broadcast_to(x3, (SPLIT, ROWS))
            mask = (0x01010101 << bit) if bit < 7 else -2139062144
{planes}{groups}{totals}{finish}    tl.store(y + token * outputs + row, total.to(y.dtype.element_ty), mask=live_row)
'''


def emit_linear_gemv(spec: LinearKernel) -> Emitted:
    """Return the kernel `linear_gemv`. Grid (tiles of all members, tokens).

    codes [tokens, columns padded to groups] int8, read four at a time; code_sum [tokens] int32, their sums (for row
    scales); all else as for `linear_dot`.
    """
    assert spec.rounds, "floats have no dp4a: linear_dot serves them"
    parameters = [("codes", "*i8"), ("token_scale", "*fp32")]
    parameters += [] if spec.grouped else [("code_sum", "*i32")]
    parameters += [("mixed", "*fp32")] if spec.ranked else []
    parameters += member_parameters(spec)
    title = f"{describe(spec)}: tiles of {spec.tile.rows} x 1 token"
    body = _GEMV.format(
        names=", ".join(name for name, _ in parameters),
        title=title,
        choice=choice(spec, spec.tile.rows),
        zeros=indented(["total = tl.zeros((SPLIT, ROWS), tl.float32)"] if spec.grouped else _integers(spec)),
        live=_live(spec),
        live_codes="" if _whole(spec)[1] else ", mask=live_group[:, None, None], other=0",
        loads="".join(_loads(spec, p) for p in range(spec.planes)) + (_group_zeros(spec) if spec.grouped else ""),
        sum_x=indented(_SUM_X, 3) if spec.grouped else "",
        planes="".join(_plane(spec, p) for p in range(spec.planes)),
        groups="".join(_group_end(spec, p) for p in range(spec.planes)) if spec.grouped else "",
        totals=_totals(spec),
        finish=_finish(spec),
    )
    numbers = {**constants(spec), "SPLIT": spec.tile.split}
    source = head(title, numbers) + _DP4A[spec.assembly] + _SPLIT4 + body
    steps = -(-spec.groups // spec.tile.split) * spec.tile.split
    work = Work(spec.tile.rows * steps * GROUP * spec.planes, 1)
    return Emitted("linear_gemv", title, source, tuple(parameters), spec.tile.warps, spec.tile.stages, work)


_SUM_X = ["sum_x = four(0x01010101, 0x01010101, 0x01010101, 0x01010101, x0, x1, x2, x3, sum_x)"]


def _whole(spec: LinearKernel) -> tuple[bool, bool]:
    """Whether every tile's rows, and every step's groups, are all there: a mask costs a tenth of all instructions."""
    return all(out % spec.tile.rows == 0 for out in spec.out_features), spec.groups % spec.tile.split == 0


def _live(spec: LinearKernel) -> str:
    """Return the lines that say which groups, and which of the step's weights, are there."""
    rows, groups = _whole(spec)
    lines = [] if groups else ["live_group = group < GROUPS"]
    parts = [] if groups else ["live_group[:, None]"]
    parts += [] if rows else ["live_row[None, :]"]
    return indented([*lines, *([f"inside = tl.broadcast_to({' & '.join(parts)}, (SPLIT, ROWS))"] if parts else [])], 2)


def _integers(spec: LinearKernel) -> list[str]:
    return [f"sums_{p} = tl.zeros((SPLIT, ROWS), tl.int32)" for p in range(spec.planes)]


def _group_zeros(spec: LinearKernel) -> str:
    return indented([*_integers(spec), "sum_x = tl.zeros((SPLIT, 1), tl.int32)"], 2)


def _loads(spec: LinearKernel, plane: int) -> str:
    names = ", ".join(f"w{c}_{plane}" for c in range(4))
    group = group_of(spec, plane)
    at = f"(({group}[:, None] * outputs + row[None, :]) * 4)[:, :, None] + word[None, None, :]"
    load = "tl.load(words + at)" if all(_whole(spec)) else "tl.load(words + at, mask=inside[:, :, None], other=0)"
    return indented([f"at = {at}", f"{names} = split4({load}, SPLIT, ROWS)"], 2)


def _plane(spec: LinearKernel, plane: int) -> str:
    masked = ", ".join(f"w{c}_{plane} & mask" for c in range(4))
    return indented(
        [
            f"part = four({masked}, x0, x1, x2, x3, tl.zeros((SPLIT, ROWS), tl.int32))",
            f"sums_{plane} += part * (1 << (7 - bit))",
        ],
        3,
    )


def _group_end(spec: LinearKernel, plane: int) -> str:
    at = f"{group_of(spec, plane)}[:, None] * outputs + row[None, :]"
    return indented(
        [
            f"group_scale = tl.load(scale + {at}{'' if all(_whole(spec)) else ', mask=inside, other=0.0'})",
            f"total += (sums_{plane} - 64 * sum_x).to(tl.float32) * group_scale",
        ],
        2,
    )


def _totals(spec: LinearKernel) -> str:
    """Return lines that reduce over groups and apply row scales: 128 S - 64 X is 64 times the product."""
    if spec.grouped:
        return indented(["total = tl.sum(total, 0) * 0.015625"])
    lines = ["sum_x = tl.load(code_sum + token)"]
    for p in range(spec.planes):
        lines += [f"row_scale = tl.load(scale + outputs * {p} + row, mask=live_row, other=0.0)"]
        product = f"(tl.sum(sums_{p}, 0) - 64 * sum_x).to(tl.float32) * row_scale"
        lines += [f"total {'+=' if p else '='} {product}"]
    return indented([*lines, "total = total * 0.015625"])


def _finish(spec: LinearKernel) -> str:
    lines = []
    if spec.ranked:
        lines += [
            "component = tl.arange(0, RANK)",
            "at = token * RANKS + rank_first + component",
            "t = tl.load(mixed + at, mask=component < rank, other=0.0)",
            *more_parts(spec, "tl.num_programs(1)", "mask=component < rank"),
            "inside = live_row[:, None] & (component[None, :] < rank)",
            "factor = tl.load(low_rank_out + row[:, None] * rank + component[None, :], mask=inside, other=0)",
            "total += tl.sum(factor.to(tl.float32) * t[None, :], 1)",
        ]
    lines += ["total = total * tl.load(token_scale + token)"]
    if any(spec.biases):
        lines += ["total += tl.load(bias + row, mask=row < bias_rows, other=0.0)"]
    if any(spec.residuals):
        at = "token * outputs + row"
        lines += [f"total += tl.load(residual + {at}, mask=row < residual_rows, other=0.0).to(tl.float32)"]
    return indented(lines)

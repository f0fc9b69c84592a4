"""Triton kernels of 1-bit linears on matrix units: the product itself, and the low-rank pair's first half.

y = token_scale * (sum_p scale_p (B_p q) + low_rank_out t) + bias + residual. Weights are in layout P: words int32
[planes, groups, out, 4], bit 8b + p of word c is channel 128 g + 16 p + 4 c + b, 1 for +1. Members that share codes
are one launch: a program finds its member by its number.
"""

from collections.abc import Sequence

from bwla_compiler.codegen.triton_spec import GROUP, Emitted, LinearKernel, Work, padded
from bwla_compiler.codegen.triton_text import (
    choose_number,
    choose_pointers,
    expand_function,
    head,
    indented,
    members,
    product_function,
    rank_firsts,
)
from bwla_compiler.cost.factors import power_of_two

RANK_SLAB = 16
"""Low-rank components that are multiplied at a time."""

_TILE = '''

@triton.jit(do_not_specialize=["tokens"])
def {name}({names}):
    """{title}."""
    tile = tl.program_id(0)
    block = tl.program_id(1).to(tl.int64) * TOKENS
{choice}    row = (tile - first) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
'''
"""The first lines of a kernel: which member, rows [ROWS] and tokens [TOKENS] this program computes."""

_LIVE = """\
    live_row = row < outputs
    live_token = block + token < tokens
"""

_SUMS = """\
    channel = tl.arange(0, 128)
    word = tl.arange(0, 4)
    codes += block * STRIDE
{zeros}    for start in {groups}:
{steps}"""

_STEP = """\
        group = start + {step}
        q = tl.load(codes + token[:, None] * STRIDE + group * 128 + channel[None, :], mask=live_token[:, None], other=0)
{planes}"""

_RESULT = """\
    at = block * outputs + token[None, :] * outputs + row[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=live)
"""

_LOW_RANK = """\
    channel = tl.arange(0, 128)
    live_row = row < rank
    live_token = block + token < tokens
    codes += block * STRIDE
    total = tl.zeros((ROWS, TOKENS), {accumulator})
    first_group = tl.program_id(2) * CHUNK
    for group in tl.range(first_group, tl.minimum(first_group + CHUNK, GROUPS), num_stages=STAGES):
        k = group * 128 + channel
        q = tl.load(codes + token[:, None] * STRIDE + k[None, :], mask=live_token[:, None], other=0)
        inside = live_row[:, None] & (k[None, :] < COLUMNS)
        factor = tl.load(low_rank_in + row[:, None] * COLUMNS + k[None, :], mask=inside, other=0)
        total = {dot}
    row_scale = tl.load(low_rank_scale + row, mask=live_row, other=0.0)
    live = live_row[:, None] & live_token[None, :]
    at = (tl.program_id(2).to(tl.int64) * tokens + block + token[None, :]) * RANKS + rank_first + row[:, None]
    tl.store(mixed + at, total.to(tl.float32) * row_scale[:, None], mask=live)
"""


def member_parameters(spec: LinearKernel, *, sums: bool = True, rest: bool = True) -> list[tuple[str, str]]:
    """Return (name, type) of the tensors of each member, in order. sums, rest: of which of the two steps."""
    found = []
    for i, rank in enumerate(spec.ranks):
        found += [(f"words_{i}", "*i32")] if sums else []
        found += [(f"scale_{i}", "*fp32")] if (sums if spec.grouped else rest) else []
        if rest:
            found += [(f"low_rank_out_{i}", "*i8")] if rank else []
            found += [(f"bias_{i}", "*fp32")] if spec.biases[i] else []
            found += [(f"residual_{i}", "*x")] if spec.residuals[i] else []
            found += [(f"y_{i}", "*x")]
    return found


def choice(spec: LinearKernel, rows: int, *, sums: bool = True, rest: bool = True) -> str:
    """Return lines that choose the tensors and numbers of the member that a program, with tiles of `rows`, computes."""
    outs, everyone = spec.out_features, [True] * len(spec.out_features)
    first = spec.first_tiles(outs, rows)[:-1]
    lines = choose_number("first", first, first) + choose_number("outputs", outs, first)
    names = (("words", sums), ("scale", sums if spec.grouped else rest), ("y", rest))
    pointers = {name: members(name, everyone) for name, there in names if there}
    if not (sums and rest):
        lines += choose_number("output_first", [sum(outs[:i]) for i in range(len(outs))], first)
    if rest:
        for name, present in (("bias", spec.biases), ("residual", spec.residuals)):
            if any(present):
                pointers[name] = members(name, present)
                own = [out if there else 0 for out, there in zip(outs, present, strict=True)]
                lines += choose_number(f"{name}_rows", own, first)
        if spec.ranked:
            pointers["low_rank_out"] = members("low_rank_out", [rank > 0 for rank in spec.ranks])
            lines += choose_number("rank", spec.ranks, first)
            lines += choose_number("rank_first", rank_firsts(spec.ranks), first)
    return indented(lines + choose_pointers(pointers, first))


def constants(spec: LinearKernel) -> dict[str, int | float | str | bool]:
    """Return the compile-time numbers that the linear kernels share."""
    found: dict[str, int | float | str | bool] = {
        "GROUPS": spec.groups,
        "STRIDE": padded(spec.columns),
        "ROWS": spec.tile.rows,
        "STAGES": spec.stages,
    }
    if spec.ranked and spec.tile.parts == 1:
        found |= {"RANK": power_of_two(max(spec.ranks)), "RANKS": sum(spec.ranks)}
    return found


def _product(spec: LinearKernel) -> str:
    """Return the function of float products, where there are any; what stands on the left is signs or int8."""
    needed = spec.ranked or not spec.rounds
    return product_function(spec.precision, name="product", x="b") if needed else ""


def describe(spec: LinearKernel) -> str:
    """Return what the kernel computes, in a few words."""
    parts = [f"1-bit linear {spec.columns} -> {' + '.join(map(str, spec.out_features))}", f"A{spec.activation_bits}"]
    parts += [f"{spec.planes} planes"] if spec.planes > 1 else []
    parts += ["group scales"] if spec.grouped else []
    parts += [f"rank {max(spec.ranks)}"] if spec.ranked else []
    parts += [name for name, present in (("bias", spec.biases), ("residual", spec.residuals)) if any(present)]
    return ", ".join(parts)


def emit_linear_dot(spec: LinearKernel) -> Emitted:
    """Return the kernel `linear_dot`. Grid (tiles of all members, blocks of tokens).

    codes [tokens, columns padded to groups] int8, or float32 from 16 bits on; token_scale [tokens] float32; mixed
    [parts, tokens, sum of ranks] float32 from `low_rank`; of each member words, scale [planes, out or (groups, out)]
    float32, low_rank_out [out, rank] int8, bias [out] float32, residual and y [tokens, out]; tokens: how many.
    Where the tile has parts, the grid has as many along its third side, and the kernel ends with the sums over its
    part of the channels: partial [parts, planes or 1, tokens, sum of outs] int32, float32 with group scales or floats.
    """
    whole = spec.tile.parts == 1
    parameters = [("codes", "*i8" if spec.rounds else "*fp32")]
    if whole:
        parameters += [("token_scale", "*fp32")] if spec.rounds else []
        parameters += [("mixed", "*fp32")] if spec.ranked else []
    parameters += member_parameters(spec, rest=whole)
    parameters += [] if whole else [("partial", _accumulator(spec))]
    parameters += [("tokens", "i32")]
    title = f"{describe(spec)}: tiles of {spec.tile.rows} x {spec.tile.tokens} tokens"
    title += "" if whole else f", sums over {spec.tile.parts} parts of the channels"
    planes = "".join(_plane(spec, p) for p in range(spec.planes))
    steps = "".join(_STEP.format(step=step, planes=planes) for step in range(spec.unrolled))
    sums = _SUMS.format(zeros=indented(_zeros(spec)), groups=_range(spec), steps=steps)
    body = tile_head("linear_dot", parameters, title=title, choice=choice(spec, spec.tile.rows, rest=whole)) + _LIVE
    body += sums + (_totals(spec) + finish(spec) if whole else _store_sums(spec))
    numbers = {**constants(spec), "TOKENS": spec.tile.tokens}
    if whole:
        numbers |= {"SLAB": RANK_SLAB, "RANK": _slabs(spec) * RANK_SLAB} if spec.ranked else {}
    else:
        numbers |= {"CHUNK": spec.part_groups, "OUTPUTS": sum(spec.out_features)}
    functions = expand_function(assembly=spec.assembly) + (_product(spec) if whole or not spec.rounds else "")
    source = head(title, numbers) + "\n" + functions + body
    tile = spec.tile
    work = Work(
        tile.rows * spec.part_groups * GROUP * spec.planes, tile.tokens, _slabs(spec) if whole and spec.ranked else 1
    )
    return Emitted("linear_dot", title, source, tuple(parameters), tile.warps, spec.stages, work)


def emit_linear_sum(spec: LinearKernel) -> Emitted:
    """Return the kernel `linear_sum`, which follows a `linear_dot` with parts. Grid (tiles, blocks of tokens).

    partial: what that left; all else as for a `linear_dot` without parts.
    """
    assert spec.tile.parts > 1
    tile = spec.sum_tile
    parameters = [("partial", _accumulator(spec))]
    parameters += [("token_scale", "*fp32")] if spec.rounds else []
    parameters += [("mixed", "*fp32")] if spec.ranked else []
    parameters += [*member_parameters(spec, sums=False), ("tokens", "i32")]
    title = f"{describe(spec)}: the sum of {spec.tile.parts} parts, tiles of {tile.rows} x {tile.tokens} tokens"
    body = tile_head("linear_sum", parameters, title=title, choice=choice(spec, tile.rows, sums=False)) + _LIVE
    body += _load_sums(spec) + _totals(spec) + finish(spec)
    numbers = {"ROWS": tile.rows, "TOKENS": tile.tokens, "OUTPUTS": sum(spec.out_features), "PARTS": spec.tile.parts}
    if spec.ranked:
        numbers |= {"RANK": _slabs(spec) * RANK_SLAB, "RANKS": sum(spec.ranks), "SLAB": RANK_SLAB}
    source = head(title, numbers) + (_product(spec) if spec.ranked else "") + body
    return Emitted("linear_sum", title, source, tuple(parameters), tile.warps, tile.stages)


def _accumulator(spec: LinearKernel) -> str:
    """Return the type of partial sums: integers stay exact."""
    return "*i32" if spec.rounds and not spec.grouped else "*fp32"


def _slabs(spec: LinearKernel) -> int:
    return -(-max(spec.ranks) // RANK_SLAB)


def _range(spec: LinearKernel) -> str:
    """Return the groups that a program goes through."""
    step = f"{spec.unrolled}, num_stages=STAGES)"
    if spec.tile.parts == 1:
        return f"tl.range(0, GROUPS, {step}"
    return f"tl.range(tl.program_id(2) * CHUNK, tl.minimum(tl.program_id(2) * CHUNK + CHUNK, GROUPS), {step}"


def _sum_names(spec: LinearKernel) -> list[str]:
    """Return the names of what a program sums up."""
    return ["total"] if spec.grouped else [f"sums_{p}" for p in range(spec.planes)]


def _store_sums(spec: LinearKernel) -> str:
    names = _sum_names(spec)
    lines = ["live = live_row[:, None] & live_token[None, :]"]
    lines += [f"part = (tl.program_id(2) * {len(names)}).to(tl.int64)"]
    for i, name in enumerate(names):
        lines += [f"at = ((part + {i}) * tokens + block + token[None, :]) * OUTPUTS + output_first + row[:, None]"]
        lines += [f"tl.store(partial + at, {name}, mask=live)"]
    return indented(lines)


def _load_sums(spec: LinearKernel) -> str:
    names = _sum_names(spec)
    lines = ["live = live_row[:, None] & live_token[None, :]", *_zeros(spec)]
    loop = []
    for i, name in enumerate(names):
        at = f"((part * {len(names)} + {i}) * tokens + block + token[None, :]) * OUTPUTS + output_first + row[:, None]"
        loop += [f"{name} += tl.load(partial + {at}, mask=live, other=0)"]
    return indented([*lines, "for part in tl.static_range(PARTS):"]) + indented(loop, 2)


def tile_head(name: str, parameters: Sequence[tuple[str, str]], *, title: str, choice: str) -> str:
    """Return a kernel's first lines, which say what a program computes; choice: of the member."""
    names = ", ".join(name for name, _ in parameters)
    return _TILE.format(name=name, names=names, title=title, choice=choice)


def _zeros(spec: LinearKernel) -> list[str]:
    if spec.grouped:
        return ["total = tl.zeros((ROWS, TOKENS), tl.float32)"]
    kind = "tl.int32" if spec.rounds else "tl.float32"
    return [f"{name} = tl.zeros((ROWS, TOKENS), {kind})" for name in _sum_names(spec)]


def group_of(spec: LinearKernel, plane: int) -> str:
    """Return the text of the current group's number among the groups of all planes."""
    return f"(group + {plane * spec.groups})" if plane else "group"


def _plane(spec: LinearKernel, plane: int) -> str:
    """Return the lines of the loop over groups that work on one plane."""
    at = f"{group_of(spec, plane)} * outputs"
    lines = [f"words_of = words + ({at} + row[:, None]) * 4 + word[None, :]"]
    lines += ["signs = expand(tl.load(words_of, mask=live_row[:, None], other=0))"]
    sums = "tl.zeros((ROWS, TOKENS), tl.float32)" if spec.grouped else f"sums_{plane}"
    if not spec.rounds:
        product = f"product(signs.to(tl.float32), tl.trans(q), {sums})"
    elif spec.grouped:
        product = "tl.dot(signs, tl.trans(q), out_dtype=tl.int32)"
    else:
        product = f"tl.dot(signs, tl.trans(q), acc={sums}, out_dtype=tl.int32)"
    if spec.grouped:
        lines += [f"group_scale = tl.load(scale + {at} + row, mask=live_row, other=0.0)"]
        lines += [f"total += {product}.to(tl.float32) * group_scale[:, None]"]
    else:
        lines += [f"{sums} = {product}"]
    return indented(lines, 2)


def _totals(spec: LinearKernel) -> str:
    """Return lines that apply row scales, and take back the 64 of the signs."""
    lines = []
    if not spec.grouped:
        for p in range(spec.planes):
            lines += [f"row_scale = tl.load(scale + outputs * {p} + row, mask=live_row, other=0.0)"]
            lines += [f"total {'+=' if p else '='} sums_{p}.to(tl.float32) * row_scale[:, None]"]
    return indented([*lines, "total = total * 0.015625"])


def _second_half(spec: LinearKernel) -> str:
    """Return lines that add the low-rank pair, a slab of components at a time: all of them at once spill."""
    if not spec.ranked:
        return ""
    slab = [
        "component = start + tl.arange(0, SLAB)",
        "inside = (component[:, None] < rank) & live_token[None, :]",
        "at = (block + token[None, :]) * RANKS + rank_first + component[:, None]",
        "t = tl.load(mixed + at, mask=inside, other=0.0)",
        *more_parts(spec, "tokens", "mask=inside"),
        "inside = live_row[:, None] & (component[None, :] < rank)",
        "factor = tl.load(low_rank_out + row[:, None] * rank + component[None, :], mask=inside, other=0)",
        "total = product(factor.to(tl.float32), t, total)",
    ]
    return indented(["for start in range(0, RANK, SLAB):"]) + indented(slab, 2)


def more_parts(spec: LinearKernel, tokens: str, mask: str) -> list[str]:
    """Return lines that add to t what the other parts of the channels give; tokens: how many, as text."""
    if spec.rank_tile.parts == 1:
        return []
    load = f"tl.load(mixed + at + part * {tokens} * RANKS, {mask}, other=0.0)"
    return [f"for part in tl.static_range(1, {spec.rank_tile.parts}):", f"    t += {load}"]


def finish(spec: LinearKernel) -> str:
    """Return lines that add the low-rank pair, scale tokens, add bias and residual, and store `total`."""
    lines = ["live = live_row[:, None] & live_token[None, :]"]
    if spec.rounds:
        lines += ["total = total * tl.load(token_scale + block + token, mask=live_token, other=0.0)[None, :]"]
    if any(spec.biases):
        lines += ["total += tl.load(bias + row, mask=row < bias_rows, other=0.0)[:, None]"]
    if any(spec.residuals):
        lines += ["at = (block + token[None, :]) * outputs + row[:, None]"]
        lines += ["inside = (row < residual_rows)[:, None] & live_token[None, :]"]
        lines += ["total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)"]
    return _second_half(spec) + indented(lines) + _RESULT


def emit_low_rank(spec: LinearKernel) -> Emitted:
    """Return the kernel `low_rank`: t = (codes low_rank_in^T) * low_rank_scale. Grid (tiles of 16 rows, blocks, parts).

    codes as for `linear_dot`; of each member with a rank low_rank_in [rank, columns] int8 and low_rank_scale [rank]
    float32; mixed [parts, tokens, sum of ranks] float32 is the result, a part by the sum over its share of channels;
    tokens: how many.
    """
    ranks = [rank for rank in spec.ranks if rank]
    tile = spec.rank_tile
    first = spec.first_tiles(ranks, tile.rows)[:-1]
    parameters = [("codes", "*i8" if spec.rounds else "*fp32")]
    for i in range(len(ranks)):
        parameters += [(f"low_rank_in_{i}", "*i8"), (f"low_rank_scale_{i}", "*fp32")]
    parameters += [("mixed", "*fp32"), ("tokens", "i32")]
    chosen = choose_number("first", first, first) + choose_number("rank", ranks, first)
    chosen += choose_number("rank_first", rank_firsts(ranks), first)
    names = ("low_rank_in", "low_rank_scale")
    chosen += choose_pointers({name: members(name, [True] * len(ranks)) for name in names}, first)
    title = f"Low-rank pairs' inner {spec.columns} -> {' + '.join(map(str, ranks))}: tiles of 16 x {tile.tokens} tokens"
    body = tile_head("low_rank", parameters, title=title, choice=indented(chosen)) + _LOW_RANK.format(
        accumulator="tl.int32" if spec.rounds else "tl.float32",
        dot="tl.dot(factor, tl.trans(q), acc=total, out_dtype=tl.int32)"
        if spec.rounds
        else "product(factor.to(tl.float32), tl.trans(q), total)",
    )
    numbers = {**constants(spec), "COLUMNS": spec.columns, "ROWS": tile.rows, "TOKENS": tile.tokens}
    numbers |= {"RANKS": sum(ranks), "CHUNK": -(-spec.groups // tile.parts), "STAGES": tile.stages}
    numbers.pop("RANK", None)  # of the second half alone
    source = head(title, numbers) + ("" if spec.rounds else _product(spec)) + body
    return Emitted("low_rank", title, source, tuple(parameters), tile.warps, tile.stages)

"""The Triton kernel before a linear: prologue, change of basis and rounding to codes, one program a token.

Where a token's factors are too large for one program, a kernel with one factor and `block` turns a part of it. Of few
tokens, programs beside it take the first half of the linears' low-rank pairs along: each rounds the token for itself,
and multiplies a few components. That is one launch fewer a linear, where launches take as long as what they do.

x' by kind of prologue (a norm's statistics, an activation, a gate), x'' = (x' * scale) (left (x) right) as
Y = left^T X' right on X' [n1, n2], codes = round(x'' * column_scale / token_scale), half to even.
"""

from bwla_compiler.codegen.triton_spec import Emitted, LinearKernel, PrologueKernel
from bwla_compiler.codegen.triton_text import (
    choose_number,
    choose_pointers,
    head,
    indented,
    members,
    product_function,
    rank_firsts,
)
from bwla_compiler.cost.factors import power_of_two

SLAB = 16
"""Rows of the streamed factor, and of X', that are multiplied at a time: more of them spill at 96 x 128."""

_SIGMOID_FORM = "v / (1.0 + tl.exp(-{}))"
_ACTIVATIONS = {
    "silu": _SIGMOID_FORM.format("v"),
    "gelu": "0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))",
    # v (1 + tanh(u)) / 2 = v sigmoid(2u), u = sqrt(2 / pi) (v + 0.044715 v^3)
    "gelu_tanh": _SIGMOID_FORM.format("1.5957691216057308 * (v + 0.044715 * v * v * v)"),
    "relu": "tl.where(v < 0, 0.0, v)",  # a comparison, since maximum would drop NaN
}

_CENTRE = """    mean = tl.sum(v) / COLUMNS
    v = tl.where(every < COLUMNS, v - mean, 0.0)
"""

_STATISTICS = '''

@triton.jit
def statistics(x, eps):
    """Return the token's mean where it is taken off, else 0, and 1 / sqrt(mean square + eps)."""
    every = tl.arange(0, BLOCK)
    v = tl.load(x + every, mask=every < COLUMNS, other=0.0).to(tl.float32)
{centre}    return mean, 1.0 / tl.sqrt_rn(tl.sum(v * v) / COLUMNS + eps)
'''

_ROUND = """\
    # half to even by the addition of 1.5 * 2^23, whose unit is 1; a token that is not finite has scale NaN, codes 0
    magnitude = tl.abs(y)
    finite = tl.min((magnitude <= 3.4028234663852886e38).to(tl.int32))
    step = tl.math.div_rn(tl.max(magnitude), LIMIT * 1.0)
    step = tl.where(step > 0, step, 1.0)
    rounded = (tl.math.div_rn(y, step) + 12582912.0) - 12582912.0
    rounded = tl.minimum(tl.maximum(rounded, -LIMIT * 1.0), LIMIT * 1.0)
    code = tl.where(finite > 0, rounded, 0.0).to(tl.int32)
"""

_KEEP = [
    'tl.store(token_scale + token, tl.where(finite > 0, step, float("nan")))',
    "tl.store(code_sum + token, tl.sum(tl.where(live, code, 0)))",
    "tl.store(out + at, code.to(tl.int8), mask=live)",
]
"""What the first program of a token does with its codes."""

_MIX = [
    "component = (tile - first) * MIXED + tl.arange(0, MIXED)",
    "needed = (component < rank)[:, None] & tl.reshape(live, (SIZE,))[None, :]",
    "entry = low_rank_in + component[:, None] * COLUMNS + tl.reshape(at, (SIZE,))[None, :]",
    "weight = tl.load(entry, mask=needed, other=0).to(tl.int32)",
    "total = tl.sum(weight * tl.reshape(code, (SIZE,))[None, :], 1).to(tl.float32)",
    "total = total * tl.load(low_rank_scale + component, mask=component < rank, other=0.0)",
    "tl.store(mixed + token * RANKS + rank_first + component, total, mask=component < rank)",
]
"""What the others do: some low-rank components of the token, in integers up to their scale."""


def emit_prologue(spec: PrologueKernel) -> Emitted:
    """Return the kernel `prologue`. Grid (tokens, programs of a token).

    x, gate [tokens, n] any float; gain, shift, scale, column_scale [n], left [n1, n1], right [n2, n2] float; out
    [tokens, row_stride] int8 codes or floats; token_scale [tokens] float32, code_sum [tokens] int32: sum of codes.
    With ranks also, of each pair, low_rank_in [rank, n] int8 and low_rank_scale [rank] float32, as for `low_rank`, and
    mixed [tokens, sum of ranks] float32.
    """
    parameters = _parameters(spec)
    assert not spec.block or (spec.transform.left != spec.transform.right and not spec.rounds)
    assert not spec.ranks or (spec.rounds and all(spec.ranks))
    title = _title(spec)
    names = ", ".join(name for name, _ in parameters)
    body = [
        f'    """{title}."""\n    token = tl.program_id(0).to(tl.int64)\n    x += token * COLUMNS\n',
        "    gate += token * COLUMNS\n" if spec.gated else "",
        "    out += token * STRIDE\n",
        "    mean, inverse = statistics(x, eps)\n" if spec.normed else "",
        _factored(spec) if spec.online else _unfactored(spec),
        "    y = y * tl.load(column_scale + at, mask=live, other=0.0).to(tl.float32)\n" if spec.column_scaled else "",
        _ROUND + _share(spec) if spec.rounds else indented([_STORE, *_rest(spec)]),
    ]
    functions = (_statistics(spec) if spec.normed else "") + _channels(spec)
    functions += product_function(spec.precision, name="from_left", x="b") if spec.transform.left else ""
    functions += product_function(spec.precision, name="from_right", x="a") if spec.transform.right else ""
    source = head(title, _constants(spec)) + functions + f"\n\n@triton.jit\ndef prologue({names}):\n"
    return Emitted("prologue", title, source + "".join(body), parameters, spec.warps, 2)


def _title(spec: PrologueKernel) -> str:
    parts: list[str] = [spec.kind] if spec.kind != "none" else []
    t = spec.transform
    if spec.online:
        parts += [f"basis {t.n1 if t.left else f'I{t.n1}'} x {t.n2 if t.right else f'I{t.n2}'}"]
    parts += [f"{spec.blocks} programs a token"] if spec.block else []
    parts += [f"A{spec.activation_bits}" if spec.rounds else "floats"]
    parts += [f"low-rank {' + '.join(map(str, spec.ranks))}"] if spec.ranks else []
    return f"{', '.join(parts)} of {spec.columns} channels"


def _parameters(spec: PrologueKernel) -> tuple[tuple[str, str], ...]:
    vectors = {
        "gate": (spec.gated, "*x"),
        "gain": (spec.gain, "*x"),
        "shift": (spec.shift, "*x"),
        "scale": (spec.transform.scaled, "*fp32"),
        "left": (spec.transform.left, "*fp32"),
        "right": (spec.transform.right, "*fp32"),
        "column_scale": (spec.column_scaled, "*fp32"),
        "eps": (spec.normed, "fp32"),
        "out": (True, "*i8" if spec.rounds else "*fp32"),
        "token_scale": (spec.rounds, "*fp32"),
        "code_sum": (spec.rounds, "*i32"),
    }
    pairs = [(f"{n}_{i}", kind) for i in range(len(spec.ranks)) for n, kind in _PAIR]
    pairs += [("mixed", "*fp32")] if pairs else []
    return (("x", "*x"), *((name, kind) for name, (there, kind) in vectors.items() if there), *pairs)


def _constants(spec: PrologueKernel) -> dict[str, int | float | str | bool]:
    constants: dict[str, int | float | str | bool] = {"COLUMNS": spec.columns, "STRIDE": spec.row_stride}
    if spec.normed or not spec.online:
        constants["BLOCK"] = power_of_two(spec.columns)
    if spec.online:
        n1, n2 = spec.transform.n1, spec.transform.n2
        streamed = n1 if _streams_left(spec) else n2
        constants |= {"N1": n1, "N2": n2, "ROWS": spec.sides[0], "COLS": spec.sides[1]}
        constants["SLAB"] = min(SLAB, power_of_two(streamed))
    if spec.rounds:
        constants["LIMIT"] = 2 ** (spec.activation_bits - 1) - 1
    if spec.ranks:
        size = spec.sides[0] * spec.sides[1] if spec.online else power_of_two(spec.columns)
        constants |= {"SIZE": size, "MIXED": spec.mixed_rows, "RANKS": sum(spec.ranks)}
    return constants


def _statistics(spec: PrologueKernel) -> str:
    return _STATISTICS.format(centre=_CENTRE if spec.kind == "layer_norm" else "    mean = 0.0\n")


def _channels(spec: PrologueKernel) -> str:
    """Return the function that reads channels of the token and does all that happens to each alone."""
    names = [name for name, there in _vectors(spec) if there]
    arguments = ", ".join(["x", *names, *(["mean", "inverse"] if spec.normed else []), "at", "live"])
    read = "tl.load({} + at, mask=live, other=0.0).to(tl.float32)"
    lines = ['"""Return these channels before the change of basis, float32; 0 where not live."""']
    lines += [f"v = {read.format('x')}"]
    if spec.kind == "layer_norm":
        lines += ["v = v - mean"]
    if spec.normed:
        lines += ["v = v * inverse"]
    activation = _ACTIVATIONS.get(spec.kind.removesuffix("_mul"))
    lines += [f"v = {activation}"] if activation else []
    lines += [f"v = v {'+' if name == 'shift' else '*'} {read.format(name)}" for name in names]
    lines += ["return tl.where(live, v, 0.0)" if spec.normed else "return v"]
    return f"\n\n@triton.jit\ndef channels({arguments}):\n{indented(lines)}"


def _vectors(spec: PrologueKernel) -> tuple[tuple[str, bool], ...]:
    return ("gate", spec.gated), ("gain", spec.gain), ("shift", spec.shift), ("scale", spec.transform.scaled)


def _call(spec: PrologueKernel) -> str:
    names = [name for name, there in _vectors(spec) if there] + (["mean", "inverse"] if spec.normed else [])
    return f"channels({', '.join(['x', *names, 'at', 'live'])})"


def _unfactored(spec: PrologueKernel) -> str:
    return indented(["at = tl.arange(0, BLOCK)", "live = at < COLUMNS", f"y = {_call(spec)}"])


def _streams_left(spec: PrologueKernel) -> bool:
    """Whether the left factor is read in slabs: the larger one is, since the other one has to be held whole."""
    t = spec.transform
    return t.left and (not t.right or t.n1 >= t.n2)


def _factored(spec: PrologueKernel) -> str:
    """Return Y = left^T X' right: one product over slabs of X' as they are read, then one with the whole factor."""
    t = spec.transform
    left = _streams_left(spec)
    row, column = "tl.arange(0, ROWS)", "tl.arange(0, COLS)"
    if spec.block and t.right:
        row = f"tl.program_id(1) * ROWS + {row}"
    elif spec.block:
        column = f"tl.program_id(1) * COLS + {column}"
    lines = [f"row = {row}", f"column = {column}", "y = tl.zeros((ROWS, COLS), tl.float32)"]
    lines += [f"for start in range(0, {'N1' if left else 'N2'}, SLAB):", "    inner = start + tl.arange(0, SLAB)"]
    if left:
        slab = ["at = inner[:, None] * N2 + column[None, :]", "live = (inner[:, None] < N1) & (column[None, :] < N2)"]
        slab += [f"v = {_call(spec)}", *_factor("left", "inner[None, :]", "row[:, None]", "N1")]
        slab += ["y = from_left(factor, v, y)"]
    else:
        slab = ["at = row[:, None] * N2 + inner[None, :]", "live = (row[:, None] < N1) & (inner[None, :] < N2)"]
        slab += [f"v = {_call(spec)}", *_factor("right", "inner[:, None]", "column[None, :]", "N2")]
        slab += ["y = from_right(v, factor, y)"]
    lines += ["    " + line for line in slab]
    if left and t.right:
        lines += ["inner = tl.arange(0, COLS)", *_factor("right", "inner[:, None]", "column[None, :]", "N2")]
        lines += ["y = from_right(y, factor, tl.zeros((ROWS, COLS), tl.float32))"]
    elif t.left and not left:
        lines += ["inner = tl.arange(0, ROWS)", *_factor("left", "inner[None, :]", "row[:, None]", "N1")]
        lines += ["y = from_left(factor, y, tl.zeros((ROWS, COLS), tl.float32))"]
    lines += ["at = row[:, None] * N2 + column[None, :]", "live = (row[:, None] < N1) & (column[None, :] < N2)"]
    return indented(lines)


def _factor(name: str, first: str, second: str, side: str) -> list[str]:
    """Return lines that read entries [first, second] of a factor, 0 outside."""
    return [
        f"inside = ({first} < {side}) & ({second} < {side})",
        f"factor = tl.load({name} + {first} * {side} + {second}, mask=inside, other=0.0).to(tl.float32)",
    ]


_STORE = "tl.store(out + at, y.to(out.dtype.element_ty), mask=live)"
_PAIR = ("low_rank_in", "*i8"), ("low_rank_scale", "*fp32")


def _share(spec: PrologueKernel) -> str:
    """Return the lines that keep the codes; with ranks in the first program of a token, and what the others do."""
    keep = [*_KEEP, *_rest(spec)]
    if not spec.ranks:
        return indented(keep)
    first = LinearKernel.first_tiles(spec.ranks, spec.mixed_rows)[:-1]
    chosen = choose_number("first", first, first) + choose_number("rank", spec.ranks, first)
    chosen += choose_number("rank_first", rank_firsts(spec.ranks), first)
    chosen += choose_pointers({name: members(name, [True] * len(first)) for name, _ in _PAIR}, first)
    choice = indented(["tile = tl.program_id(1) - 1", "if tile < 0:"]) + indented(keep, 2)
    return choice + indented(["else:"]) + indented([*chosen, *_MIX], 2)


def _rest(spec: PrologueKernel) -> list[str]:
    """Return the lines that fill the row's last, incomplete group with zeros."""
    if spec.row_stride == spec.columns:
        return []
    lines = ["rest = tl.arange(0, 128) + COLUMNS"]  # where programs share a token, each writes them
    return [*lines, "tl.store(out + rest, tl.zeros((128,), out.dtype.element_ty), mask=rest < STRIDE)"]

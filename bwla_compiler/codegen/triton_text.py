"""Text that the Triton emitters share: a module's head, and the choice of a member by the program's number."""

from collections.abc import Mapping, Sequence

from bwla_compiler.codegen.triton_spec import Precision

_SIGNS = {
    True: '''
@triton.jit
def signs64(bits):
    """Return bytes -64 and +64 for bytes whose top bit is 0 and 1: one instruction, which some compilers split."""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, 0x80808080, 0xC0C0C0C0, 0x6A;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1
    )
''',
    False: '''
@triton.jit
def signs64(bits):
    """Return bytes -64 and +64 for bytes whose top bit is 0 and 1."""
    return (bits & -2139062144) ^ -1061109568
''',
}

_EXPAND = '''

@triton.jit
def expand(words):
    """Return the signs of one group as -64 and +64, int8 [ROWS, 128] in channel order, of words int32 [ROWS, 4].

    Bit 8b + p of word c is channel 16p + 4c + b. Shifted left by 7 - p it is the top bit of byte b: 0x80 set or not,
    exclusive or 0xC0, is 64 or -64.
    """
    bit = tl.arange(0, 8)
    bytes4 = signs64(words[:, None, :] << (7 - bit)[None, :, None])
    even = tl.join(bytes4.to(tl.int8), (bytes4 >> 16).to(tl.int8))
    odd = tl.join((bytes4 >> 8).to(tl.int8), (bytes4 >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (ROWS, 128))
'''


def expand_function(*, assembly: bool) -> str:
    """Return the function `expand` and what it needs; assembly: CUDA's."""
    return _SIGNS[assembly] + _EXPAND


_IN_TWO = '''

@triton.jit
def products(a, b, acc):
    """Return acc + a @ b in float32 by tf32 products; {x} in two parts, the other operand is exact in tf32."""
    high = ({x}.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    low = {x} - high
    acc = tl.dot({high}, acc=acc, input_precision="tf32")
    return tl.dot({low}, acc=acc, input_precision="tf32")
'''

_AT_ONCE = '''

@triton.jit
def products(a, b, acc):
    """Return acc + a @ b in float32."""
    return tl.dot(a, b, acc=acc, input_precision="{precision}")
'''


def product_function(precision: Precision, *, name: str, x: str) -> str:
    """Return the function `name` of (a, b, acc); x: which of "a" and "b" holds more bits than tf32."""
    if precision == "tf32x2":
        high, low = ("high, b", "low, b") if x == "a" else ("a, high", "a, low")
        text = _IN_TWO.format(x=x, high=high, low=low)
    else:
        text = _AT_ONCE.format(precision=precision)
    return text.replace("products", name)


def head(title: str, constants: Mapping[str, int | float | str | bool]) -> str:
    """Return the first lines of a module: what it does, imports, and its numbers as compile-time constants."""
    lines = [f'"""{title}. Emitted by bwla-compiler; edits are lost."""', "", "import triton"]
    lines += ["import triton.language as tl", ""]
    lines += [f"{name} = tl.constexpr({value!r})" for name, value in constants.items()]
    return "\n".join(lines) + "\n"


def indented(lines: Sequence[str], depth: int = 1) -> str:
    """Return lines of a function's body, indented; empty for none."""
    return "".join(f"{'    ' * depth}{line}\n" for line in lines)


def choose_pointers(names: Mapping[str, Sequence[str]], first: Sequence[int]) -> list[str]:
    """Return lines that set each name to the pointer of the member whose tiles hold `tile`."""
    lines = [f"{name} = {of_members[0]}" for name, of_members in names.items()]
    for member, start in enumerate(first[1:], 1):
        lines += [f"if tile >= {start}:"]
        lines += [f"    {name} = {of_members[member]}" for name, of_members in names.items()]
    return lines


def choose_number(name: str, values: Sequence[int], first: Sequence[int]) -> list[str]:
    """Return lines that set `name` to the number of the member whose tiles hold `tile`."""
    if len(set(values)) == 1:
        return [f"{name} = {values[0]}"]
    chosen = str(values[0])
    for value, start in zip(values[1:], first[1:], strict=False):
        chosen = f"tl.where(tile >= {start}, {value}, {chosen})"
    return [f"{name} = {chosen}"]


def members(name: str, present: Sequence[bool]) -> list[str]:
    """Return each member's parameter name; one that has none borrows the first that there is, and is masked."""
    own = [f"{name}_{i}" for i, there in enumerate(present) if there]
    return [f"{name}_{i}" if there else own[0] for i, there in enumerate(present)]


def rank_firsts(ranks: Sequence[int]) -> list[int]:
    """Return where each member's low-rank components stand among those of all."""
    return [sum(ranks[:i]) for i in range(len(ranks))]

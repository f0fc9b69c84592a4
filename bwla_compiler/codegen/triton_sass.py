"""NVIDIA machine code as text: its instructions, its loops, and how many instructions a program executes.

A loop's trips are not in the code. They follow from the products: a kernel needs a known number of integer
multiply-adds, an instruction does a known number, so that (needed - those outside) / (those inside) trips remain.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

LANES = 32
"""Threads of a warp."""

_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);")
_DOT4 = 4 * LANES
_TILE = re.compile(r"^(IMMA|HMMA)\.(?:SP\.)?(16|8)(8|16)(\d+)")
_GROUP_TILE = re.compile(r"^[IH]GMMA\.(?:SP\.)?64x(\d+)x(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One line. address: in bytes; target: of a branch, else None."""

    address: int
    opcode: str
    target: int | None = None

    @property
    def integer_products(self) -> int:
        """Integer multiply-adds of one warp that executes this; 0 where it is no product, or one of floats."""
        if self.opcode.startswith("IDP"):
            return _DOT4
        return _matrix_products(self.opcode) if self.opcode.startswith(("IMMA", "IGMMA")) else 0

    @property
    def float_products(self) -> int:
        """Float multiply-adds of one warp on matrix units."""
        return _matrix_products(self.opcode) if self.opcode.startswith(("HMMA", "HGMMA")) else 0


def _matrix_products(opcode: str) -> int:
    if tile := _GROUP_TILE.match(opcode):
        return 64 * int(tile[1]) * int(tile[2]) // 4  # four warps issue it together
    if tile := _TILE.match(opcode):
        return int(tile[2]) * int(tile[3]) * int(tile[4])
    return 0


@dataclass(frozen=True)
class Loop:
    """Instructions first to last, the branch back, by position."""

    first: int
    last: int


def instructions(text: str) -> list[Instruction]:
    """Return the instructions of what `cuobjdump -sass` prints, in order."""
    found = []
    for address, opcode, rest in _LINE.findall(text):
        targets = re.findall(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else []
        found.append(Instruction(int(address, 16), opcode, int(targets[-1], 16) if targets else None))
    return found


def innermost_loops(code: Sequence[Instruction]) -> list[Loop]:
    """Return the loops that hold no other; a branch to itself, which ends a kernel, is none."""
    at = {instruction.address: i for i, instruction in enumerate(code)}
    back = [
        Loop(at[one.target], i)
        for i, one in enumerate(code)
        if one.target is not None and one.target in at and at[one.target] < i
    ]
    return [a for a in back if not any(b != a and a.first <= b.first and b.last <= a.last for b in back)]


@dataclass(frozen=True)
class Executed:
    """Instructions that one warp executes: in innermost loops, all their trips together, and in all."""

    in_loops: float
    whole: float


def executed(code: Sequence[Instruction], *, needed: int, slabs: int = 1) -> Executed | None:
    """Return the instructions that one warp executes, None where its products do not tell the trips.

    needed: integer multiply-adds of a warp. slabs: trips of every loop of float products. Of several loops with
    integer products the one that does most of them has all trips, the others one; without loops all is one.
    """
    loops = innermost_loops(code)
    inside = [_products(code[loop.first : loop.last + 1]) for loop in loops]
    if not any(inside):
        return Executed(len(code), len(code)) if _products(code) >= needed else None
    main = max(range(len(loops)), key=inside.__getitem__)
    trips = (needed - (_products(code) - inside[main])) / inside[main]
    if trips < 1:
        return None
    in_loops, whole = 0.0, float(len(code))
    for i, loop in enumerate(loops):
        body = code[loop.first : loop.last + 1]
        slab = not inside[i] and any(one.float_products for one in body)
        times = trips if i == main else slabs if slab else 1
        in_loops += times * len(body) if inside[i] or slab else 0
        whole += (times - 1) * len(body)
    return Executed(in_loops, whole)


def _products(code: Sequence[Instruction]) -> int:
    return sum(one.integer_products for one in code)

"""Spaces: the bases that tensor axes live in, unified by dataflow.

A space is atomic, a Kronecker product (made by `view`) or a direct sum (made by slice, split and cat).
Union-find unifies spaces that an operation forces to be equal. A space starts free (any orthogonal matrix),
and may lose freedom: to matrices that fix the all-ones vector, then to the identity ("pinned"). A compound is
constrained by constraining its parts: a Kronecker product or a direct sum of matrices that fix ones fixes ones.
"""

import enum
import math
from collections.abc import Sequence
from typing import Literal

Kind = Literal["product", "sum"]


class Freedom(enum.IntEnum):
    """What a space may be rotated by; larger is less free."""

    FREE = 0
    FIXES_ONES = 1
    PINNED = 2


class Space:
    """One space; follow `find()` before reading anything."""

    def __init__(self, size: int, freedom: Freedom = Freedom.FREE, reason: str = "") -> None:
        self.size = int(size)
        self.freedom = freedom
        self.reason = reason
        self.kind: Kind | None = None
        self.parts: list[Space] = []
        self._parent: Space | None = None

    def find(self) -> "Space":
        """Return the representative of this space's class; the way there is halved, so that it stays short."""
        space = self
        while (parent := space._parent) is not None:
            if parent._parent is not None:
                space._parent = parent._parent
            space = parent
        return space

    def merge_into(self, other: "Space") -> None:
        """Make `other` the representative of this (root) space."""
        self._parent = other


def pinned(size: int, reason: str) -> Space:
    """Return a fresh space that is the identity from the start."""
    return Space(size, Freedom.PINNED, reason)


def constrain(space: Space, freedom: Freedom, reason: str) -> None:
    """Take freedom away from a space and all its parts; the first reason stays."""
    root = space.find()
    if root.freedom >= freedom:
        return
    root.freedom, root.reason = freedom, reason
    for part in root.parts:
        constrain(part, freedom, reason)


def pin(space: Space, reason: str) -> None:
    """Force the identity basis."""
    constrain(space, Freedom.PINNED, reason)


def compound(kind: Kind, parts: Sequence[Space]) -> Space:
    """Return the product or sum of spaces (one part is itself)."""
    if len(parts) == 1:
        return parts[0]
    sizes = [p.size for p in parts]
    space = Space(math.prod(sizes) if kind == "product" else sum(sizes))
    space.kind, space.parts = kind, list(parts)
    return space


def parts_of(space: Space, kind: Kind) -> list[Space]:
    """Return the parts of a space along one kind of structure, flattened."""
    root = space.find()
    if root.kind == kind:
        return [leaf for part in root.parts for leaf in parts_of(part, kind)]
    return [root]


def leaves(space: Space) -> list[Space]:
    """Return the atomic spaces below a space, in order."""
    root = space.find()
    if root.kind is None:
        return [root]
    return [leaf for part in root.parts for leaf in leaves(part)]


def refine(space: Space, kind: Kind, sizes: Sequence[int]) -> list[Space]:
    """Give an atomic space a structure of fresh parts, and return them."""
    root = space.find()
    assert root.kind is None
    root.kind = kind
    root.parts = [Space(size, root.freedom, root.reason) for size in sizes]
    return root.parts


def unify(a: Space, b: Space, reason: str) -> None:
    """Force two spaces of one size to be equal; where their structures disagree, both are pinned."""
    a, b = a.find(), b.find()
    if a is b:
        return
    assert a.size == b.size, f"{reason}: {a.size} against {b.size}"
    constrain(a, b.freedom, b.reason)
    constrain(b, a.freedom, a.reason)
    if a.kind is None:
        a.merge_into(b)
    elif b.kind is None:
        b.merge_into(a)
    elif a.kind != b.kind:
        _clash(a, b, f"{reason}: a product meets a sum")
    else:
        _unify_parts(a, b, reason)


def _clash(a: Space, b: Space, reason: str) -> None:
    pin(a, reason)
    pin(b, reason)


def _unify_parts(a: Space, b: Space, reason: str) -> None:
    """Walk two products (or sums) side by side, refining the larger part where boundaries differ."""
    kind = a.kind
    assert kind is not None
    left, right = parts_of(a, kind), parts_of(b, kind)
    while left and right:
        x, y = left.pop(0).find(), right.pop(0).find()
        if x.size == y.size:
            unify(x, y, reason)
            continue
        big, small, rest = (x, y, left) if x.size > y.size else (y, x, right)
        divides = kind == "sum" or big.size % small.size == 0
        if big.kind is not None or not divides:
            _clash(a, b, f"{reason}: parts of {x.size} and {y.size} do not line up")
            return
        remainder = big.size - small.size if kind == "sum" else big.size // small.size
        first, second = refine(big, kind, (small.size, remainder))
        unify(first, small, reason)
        rest.insert(0, second)


def piece(space: Space, start: int, end: int, reason: str) -> Space:
    """Return the part [start, end) of a direct sum, refining where needed."""
    root = space.find()
    if start == 0 and end == root.size:
        return root
    if root.kind == "product":
        pin(root, f"{reason}: a slice of a product")
        return pinned(end - start, reason)
    if root.kind is None:
        refine(root, "sum", [s for s in (start, end - start, root.size - end) if s])
    found, offset = [], 0
    for part in list(root.parts):
        part = part.find()
        low, high = max(start, offset), min(end, offset + part.size)
        if low < high:
            found.append(piece(part, low - offset, high - offset, reason))
        offset += part.size
    return compound("sum", found)

"""What repeats is shown once: names with their numbers hidden, ranges of blocks, blocks of one structure."""

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from bwla_compiler.graph.plan import Basis, Norm

T = TypeVar("T")


def mask(text: str) -> str:
    """Return a reason without the numbers in it, so that those of repeated blocks agree: silu_1 is as silu."""
    return re.sub(r"\d+", "#", re.sub(r"_\d+\b", "", text))


def mask_name(name: str) -> str:
    """Return a dotted name with the parts that are numbers hidden: layers.3.ln_1 -> layers.#.ln_1."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


def span(names: Sequence[str]) -> str:
    """Return one name for many that differ in one number: layers.0.x, layers.1.x -> layers.{0-1}.x.

    Where they differ in more, the first and how many others.
    """
    if len(names) == 1:
        return names[0]
    parts = [re.split(r"(\d+)", name) for name in names]
    varying = [i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1]
    if len({len(p) for p in parts}) > 1 or len(varying) != 1 or not parts[0][varying[0]].isdigit():
        return f"{names[0]} and {len(names) - 1} more"
    (at,) = varying
    return "".join([*parts[0][:at], "{" + ranges([int(p[at]) for p in parts]) + "}", *parts[0][at + 1 :]])


def spans(names: Iterable[str]) -> tuple[str, ...]:
    """Return names with those that differ in one number put together; see `span`."""
    return tuple(span(same) for same in alike((mask_name(name), name) for name in names))


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as ranges: 0, 1, 2, 5 -> "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def alike(items: Iterable[tuple[Hashable, T]]) -> list[list[T]]:
    """Return the items of each key together, in the order in which the keys came."""
    found: dict[Hashable, list[T]] = {}
    for key, item in items:
        found.setdefault(key, []).append(item)
    return list(found.values())


def collapse_bases(bases: Iterable[Basis]) -> tuple[tuple[str, int, Basis], ...]:
    """Return (name for all, how many, the first) of bases that differ in the number of their block alone."""
    found = alike(((mask_name(b.name), b.size, b.freedom, mask(b.reason)), b) for b in bases)
    return tuple((span([b.name for b in same]), len(same), same[0]) for same in found)


def collapse_norms(norms: Iterable[Norm]) -> tuple[tuple[str, int, Norm], ...]:
    """Return (name for all, how many, the first) of norms that differ in the number of their block alone."""
    found = alike(((mask_name(norm_name(n)), len(n.absorbed_by), mask(n.reason)), n) for n in norms)
    return tuple((span([norm_name(n) for n in same]), len(same), same[0]) for same in found)


def norm_name(norm: Norm) -> str:
    """Return the parameter that a norm is known by."""
    return norm.gain or norm.shift or "-"

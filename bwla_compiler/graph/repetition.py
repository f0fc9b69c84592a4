"""Deep models planned by a few of their blocks: the plan of the others is repeated where it can be seen to repeat.

A capture takes time in proportion to the blocks, and all but the first and last of 64 alike ones are planned alike. So
two short models are captured, of CAPTURED - 1 and CAPTURED blocks taken from all over the depth, and what one block
more changes in a plan (names of modules and nodes count on; nothing else may change) is continued to the whole depth.
It is refused, for a capture of everything, where blocks or the config's lists differ, or where the two plans, or the
blocks of one, do not continue each other. What is not looked into is code that compares a block's number with that of
one that was not captured, and leaves no trace in the block's attributes.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bwla_compiler.graph.plan import SCHEMA, Plan
from bwla_compiler.graph.planner import make_plan

log = logging.getLogger(__name__)

CAPTURED = 5
"""Blocks of the longer short model: a first, a last, and three between that have to count on evenly."""

WORTHWHILE = 12
"""Blocks from which two short captures take less time than one of everything."""

NUMBERS = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx"})
"""Attributes that hold a block's own number and may so differ."""


@dataclass(frozen=True)
class Repetition:
    """What was not captured. blocks: name of the list of blocks; total: how many; captured: how many at a time."""

    blocks: str
    total: int
    captured: int = CAPTURED

    def __str__(self) -> str:
        return (
            f"{self.captured} of {self.total} blocks were captured, from all over {self.blocks}; the others are alike "
            "in modules, shapes and config, and repeat what was found for these"
        )


class _Uneven(Exception):
    """Two plans do not continue each other; says where."""


def plan_deep(model: nn.Module, *, worthwhile: int = WORTHWHILE) -> tuple[Plan, Repetition | None]:
    """Return the plan of a model, and what was repeated in it; None where all of it was captured.

    worthwhile: blocks from which repeating is tried. The plan equals that of `make_plan`. Raises what that raises.
    """
    found = alike_blocks(model, at_least=max(worthwhile, CAPTURED + 1))
    if found is None:
        return make_plan(model), None
    name, total = found
    last = [total - 2, total - 1]
    plans = [make_plan(_with_blocks(model, name, chosen)) for chosen in ([0, 1, *last], [0, 1, total // 2, *last])]
    try:
        grown = _Growth(name, CAPTURED - 1, total).plan(*(dataclasses.asdict(plan) for plan in plans))
    except _Uneven as uneven:
        log.info("%s: captured whole, its blocks do not repeat: %s", type(model).__name__, uneven)
        return make_plan(model), None
    return Plan.from_json(json.dumps(grown)), Repetition(name, total)


# ---------------------------------------------------------------- are the blocks alike?


def alike_blocks(model: nn.Module, *, at_least: int) -> tuple[str, int] | None:
    """Return the name and length of a model's list of blocks, None where it has no or several, or blocks differ."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) >= at_least}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        return None
    name = outer[0]
    blocks, total = lists[name], len(lists[name])
    shared = sum(len(list(b.parameters())) for b in blocks) != len({id(p) for b in blocks for p in b.parameters()})
    lists_of_config = _lists(_config(model))
    uneven = any(len(found) == total and any(x != found[0] for x in found) for found in lists_of_config)
    if shared or uneven or len({_signature(block, i) for i, block in enumerate(blocks)}) != 1:
        return None
    return name, total


def _config(model: nn.Module) -> Any:
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return {} if to_dict is None else to_dict()


def _lists(table: Any) -> Iterator[Sequence[Any]]:
    """Yield the lists of nested tables."""
    if isinstance(table, (list, tuple)):
        yield table
    elif isinstance(table, dict):
        for value in table.values():
            yield from _lists(value)


def _signature(block: nn.Module, number: int) -> str:
    """Return all that a block's code can look at, but for weights and its own number, as text."""
    parts = []
    for name, module in block.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = [(own, tuple(t.shape), t.dtype) for own, t in tensors]
        held = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        values = [(key, _value(key, held[key], number)) for key in sorted(held)]
        parts.append(f"{name} {id(type(module))} {shapes} {values}")
    return "\n".join(parts)


def _value(key: str, value: Any, number: int) -> str:
    """Return an attribute as text that is the same for equal ones alone: of other objects, which one it is."""
    if key in NUMBERS and type(value) is int:
        return f"its number + {value - number}"
    plain = (bool, int, float, str, type(None), tuple, list, dict, set, torch.dtype, torch.device)
    return repr(value) if isinstance(value, plain) else str(id(value))


def _with_blocks(model: nn.Module, name: str, chosen: Sequence[int]) -> nn.Module:
    """Return the model with these of its blocks alone; it shares modules and tensors with the whole one."""
    short = _opened(model)
    owner, (*path, last) = short, name.split(".")
    for part in path:
        owner._modules[part] = _opened(owner.get_submodule(part))
        owner = owner.get_submodule(part)
    blocks = owner.get_submodule(last)
    assert isinstance(blocks, nn.ModuleList)
    owner._modules[last] = nn.ModuleList(blocks[i] for i in chosen)
    return short


def _opened(module: nn.Module) -> nn.Module:
    """Return a copy whose table of modules may be changed."""
    found = copy(module)
    found._modules = dict(module._modules)
    return found


# ---------------------------------------------------------------- how plans grow with the depth


class _Growth:
    """Continues plans of `known` and known + 1 blocks, as plain data, to one of `total` blocks."""

    def __init__(self, blocks: str, known: int, total: int) -> None:
        self.known, self.total = known, total
        self.number = re.compile(rf"{re.escape(blocks)}\.(\d+)(?:\.|$)")

    def plan(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        """Return the plan as `Plan.to_dict` gives it; counts of unknown operations grow, too. Raises _Uneven."""
        if a["unknown"].keys() != b["unknown"].keys():
            raise _Uneven("operations without a rule")
        more = self.total - self.known
        unknown = {op: n + more * (b["unknown"][op] - n) for op, n in a["unknown"].items()}
        grown = {key: self._grown(a[key], b[key]) for key in a if key != "unknown"}
        return {"schema": SCHEMA, **grown, "unknown": unknown}

    def _grown(self, a: Any, b: Any) -> Any:
        """Return a value of the whole plan from those of both short ones."""
        if a == b:
            return a
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self._grown(a[key], b[key]) for key in a}
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return self._list(a, b)
        return _line(a, b, self.total - self.known)

    def _list(self, a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
        runs = list(self._runs(a)), list(self._runs(b))
        if len(runs[0]) != len(runs[1]):
            raise _Uneven(f"{len(runs[0])} runs of blocks, then {len(runs[1])}")
        found: list[Any] = []
        for one, two in zip(*runs, strict=True):
            if len(one) >= self.known:
                found += self._run(one, two)
            else:  # what is outside all blocks, or names one of them
                found += self._pairs(*([x for items in run.values() for x in items] for run in (one, two)))
        return found

    def _runs(self, items: Sequence[Any]) -> Iterator[dict[int, list[Any]]]:
        """Yield stretches of a list by the blocks of their items, which rise; -1: those outside all blocks."""
        run: dict[int, list[Any]] = {}
        for item in items:
            number = self._number(item)
            if run and (number < max(run) or (number >= 0) != (max(run) >= 0)):
                yield run
                run = {}
            run.setdefault(number, []).append(item)
        if run:
            yield run

    def _number(self, item: Any) -> int:
        """Return the number of the block that an item is of: of the first name in it; -1 where it is of none."""
        texts = item.values() if isinstance(item, dict) else (item,) if isinstance(item, str) else item
        name = next((text for text in texts if text and isinstance(text, str)), "")
        found = self.number.match(name)
        return int(found[1]) if found else -1

    def _run(self, a: dict[int, list[Any]], b: dict[int, list[Any]]) -> list[Any]:
        """Return what each block has one of, continued to the last: those between first and last count on evenly."""
        last = self.known - 1
        if sorted(a) != list(range(last + 1)) or sorted(b) != list(range(last + 2)):
            raise _Uneven("a list leaves out blocks")
        if any(a[i] != b[i] for i in range(last)):
            raise _Uneven("blocks depend on how many follow")
        one, two, *others = (b[i] for i in range(1, last + 1))
        for i, other in enumerate(others, start=2):
            if list(_lines(one, two, i)) != other:
                raise _Uneven(f"block {i + 1} does not continue those before it")
        between = [item for i in range(self.total - 2) for item in _lines(one, two, i)]
        return [*b[0], *between, *self._pairs(a[last], b[last + 1])]

    def _pairs(self, a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
        if len(a) != len(b):
            raise _Uneven(f"{len(a)} items, then {len(b)}")
        return [self._grown(x, y) for x, y in zip(a, b, strict=True)]


def _lines(a: Sequence[Any], b: Sequence[Any], steps: int) -> Iterator[Any]:
    if len(a) != len(b):
        raise _Uneven(f"{len(a)} items in one block and {len(b)} in the next")
    return (_line(x, y, steps) for x, y in zip(a, b, strict=True))


def _line(a: Any, b: Any, steps: int) -> Any:
    """Return a + steps * (b - a): numbers in texts count on, all else has to be equal. Raises _Uneven."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {key: _line(a[key], b[key], steps) for key in a}
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return type(a)(_lines(a, b, steps))
    if isinstance(a, str) and isinstance(b, str):
        return _text(a, b, steps)
    if a != b:
        raise _Uneven(f"{a!r}, then {b!r}")
    return a


def _text(a: str, b: str, steps: int) -> str:
    ones, twos = re.split(r"(\d+)", a), re.split(r"(\d+)", b)
    if ones[::2] != twos[::2]:
        raise _Uneven(f"{a!r}, then {b!r}")
    ones[1::2] = [str(int(x) + steps * (int(y) - int(x))) for x, y in zip(ones[1::2], twos[1::2], strict=True)]
    return "".join(ones)

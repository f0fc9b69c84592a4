"""What a matcher finds before a group of linears, and when it may be computed inside the fused operator."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from bwla_compiler.passes.match_graph import dtype_of, uncast
from bwla_compiler.runtime.ops import LIBRARY

_PROLOGUE: Any = getattr(torch.ops, LIBRARY.ns).prologue.default


@dataclass(frozen=True)
class Found:
    """A norm or activation function of x: kind as in spec.PROLOGUES, its operands, and every dtype between."""

    kind: str
    x: Node
    dtypes: set[torch.dtype]
    eps: float = 0.0
    gain: Node | None = None
    shift: Node | None = None
    gate: Node | None = None


Matcher = Callable[[Node], Found | None]


def same_shape(a: Node, b: Node) -> bool:
    """Whether two nodes' tensors have one shape for certain; symbols must be the same expression."""
    left, right = a.meta.get("val"), b.meta.get("val")
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.dim() != right.dim():
        return False
    return all(same_size(m, n) for m, n in zip(left.shape, right.shape, strict=True))


def same_size(m: int | torch.SymInt, n: int | torch.SymInt) -> bool:
    """Whether two sizes are one for certain."""
    if isinstance(m, torch.SymInt) and isinstance(n, torch.SymInt):
        return bool(m.node.expr == n.node.expr)
    return isinstance(m, int) and isinstance(n, int) and m == n


def match_call(node: Any) -> Found | None:
    """Return the norm or activation function that a call of bwla.prologue computes, or None."""
    dtypes: set[torch.dtype] = set()
    call = uncast(node, dtypes)
    if not isinstance(call, Node) or call.target is not _PROLOGUE:
        return None
    x, kind, eps, gain, shift = cast(tuple[Node, str, float, Node | None, Node | None], call.args)
    met = dtypes | ({dtype} if (dtype := dtype_of(call)) else set())
    return Found(kind, x, met, eps=eps, gain=gain, shift=shift)


def dtype_refusal(found: Found) -> str:
    """Return why a found prologue is not ours to compute: rounding to a dtype that is not the input's; else ""."""
    own = dtype_of(found.x)
    if own not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its {found.kind} reads {own}"
    foreign = found.dtypes - {torch.float32, own}
    return f"its {found.kind} of {own} goes through {sorted(map(str, foreign))[0]}" if foreign else ""

"""A run of an operator on stand-ins, on a GPU, before its kernels are put into a graph.

What a launch alone can tell is then known: which tile is the fastest, and which kernel the device cannot hold. While a
graph is traced nothing can be launched.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

log = logging.getLogger(__name__)


def rehearse(implementation: Callable[..., Any], arguments: Sequence[Any], *, exact: bool) -> bool:
    """Run an implementation on tensors in place of fake ones; return whether that could be done.

    exact: whether factors of a change of basis are exact in tf32, so that the same kernel is met. Nothing is done
    without a GPU, or where its memory does not suffice, which is logged.
    """
    if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return False
    with _disable_current_modes(), torch.no_grad():
        try:
            implementation(*pytree.tree_map(lambda value: _stand_in(value, exact), list(arguments)))
        except torch.OutOfMemoryError as error:
            log.warning("tiles of a GPU kernel are modelled, not timed: %s", error)
            return False
    return True


def _stand_in(value: Any, exact: bool) -> Any:
    """Return a tensor like a fake one, of zeros, or of thirds, which take all bits of a float."""
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.fill_(1 / 3 if made.is_floating_point() and not exact else 0)

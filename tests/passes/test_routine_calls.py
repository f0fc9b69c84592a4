"""What a step sees through: views and cuts that leave each token where it is, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bwla_compiler.passes.routine_calls import ATTENTION, activations, refusal, seen_through, step_of
from bwla_compiler.runtime.routines import Attention, Rows
from tests.passes.test_attention import traced

SEEN: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], Rows | None]] = {
    "heads": (lambda x: x.view(2, 3, 4, 16), (2, 3, 64), Rows(0, 0, 4, 16)),
    "a slice": (lambda x: x[..., 32:96].view(2, 3, 4, 16), (2, 3, 128), Rows(0, 32, 4, 16)),
    "a part": (lambda x: x.split(64, -1)[1].view(2, 3, 4, 16), (2, 3, 192), Rows(0, 64, 4, 16)),
    "heads apart": (lambda x: x * 1, (2, 3, 4, 16), None),
    "other tokens": (lambda x: x.view(2, 3, 4, 16), (3, 2, 64), None),
    "every other channel": (lambda x: x[..., ::2].view(2, 3, 4, 16), (2, 3, 128), None),
    "sequences one behind another": (lambda x: x.view(2, 3, 4, 16), (6, 64), None),
}


@pytest.mark.parametrize("name", SEEN)
def test_rows_of_attention(name: str) -> None:
    function, shape, wanted = SEEN[name]

    def attended(x: Tensor, key: Tensor, keys: Tensor, values: Tensor, start: Tensor) -> Tensor:
        rows = (function(x), key, key)
        y: Tensor = torch.ops.bwla.cached_attention(*rows, None, None, keys, values, start, None, 0.3)
        return y

    caches = [torch.zeros(2, 4, 9, 16) for _ in range(2)]
    gm = traced(attended, torch.randn(shape), torch.randn(2, 3, 4, 16), *caches, torch.tensor(0))
    (call,) = [node for node in gm.graph.nodes if node.target is ATTENTION]
    assert refusal(call) == ""
    read = activations(call)
    step: Any = step_of(call, lambda node: None if node is None else list(gm.graph.nodes).index(node))
    assert isinstance(step, Attention)
    first = next(node for node in gm.graph.nodes if node.op == "placeholder")
    if wanted is not None:
        assert read[0] is first
        assert step.rows[0] == wanted
        assert seen_through(call)[0] is call.args[0]
    else:
        assert read[0] is not first
        assert (step.rows[0].first, step.rows[0].heads, step.rows[0].size) == (0, 4, 16)

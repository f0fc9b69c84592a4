"""Compiling without code generation, which costs ten times what all else does."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from bwla_compiler.backend import entry


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a Dynamo that has compiled nothing."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._logging._internal.trace_log, "handlers", [])  # pytest would record thousands of lines


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Have the graphs that Inductor would get run as they are; return the list that they are put in."""
    found: list[GraphModule] = []

    def keep(gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None) -> Callable[..., Any]:
        found.append(gm)
        return gm.forward

    monkeypatch.setattr(entry, "lower", keep)
    return found

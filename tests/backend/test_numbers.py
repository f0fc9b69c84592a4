"""torch.compile(..., dynamic=True) makes inputs of a raw model's floats: they are constants all the same."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bwla_compiler.backend import compile_backend
from bwla_compiler.backend.raw import variants_of
from tests import tiny
from tests.backend import small
from tests.wider import wider


def dynamic(model: nn.Module, **options: object) -> nn.Module:
    return torch.compile(  # type: ignore[return-value]
        model, backend=compile_backend, fullgraph=True, dynamic=True, options={**small.OPTIONS, **options}
    )


@pytest.mark.parametrize("name", ["llama", *wider("gpt2", "gemma2")])
def test_one_graph_serves_all_lengths(name: str, graphs: list[GraphModule]) -> None:
    model = small.architecture(name)
    fast = dynamic(model)
    with torch.no_grad():
        for length in (11, 5, 24):
            ids = tiny.ids(length=length)
            assert small.error(fast(ids).logits, small.only_variant(model).quantized(ids).logits) < 1e-5
    assert len(graphs) == 1


class Scaled(nn.Module):
    """Two linears around a norm whose gain has an offset, and a factor that is told at every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.gain, self.offset = nn.Parameter(torch.randn(48)), 1.0

    def forward(self, x: Tensor, factor: float) -> Tensor:
        y: Tensor = self.down(nn.functional.rms_norm(self.up(x), (48,)) * (self.gain + self.offset)) * factor
        return y


@pytest.mark.parametrize("dynamically", [True, None])
def test_a_number_that_changes_is_compiled_anew(dynamically: bool | None, graphs: list[GraphModule]) -> None:
    model, x = Scaled(), torch.randn(5, 32)
    options = small.PRECISE
    fast = torch.compile(model, backend=compile_backend, dynamic=dynamically, options=options)
    with torch.no_grad():
        for factor, offset in ((1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (3.0, -5.0), (1.0, 1.0)):
            model.offset = offset
            assert small.error(fast(x, factor), model(x, factor)) < 0.3
    assert len(variants_of(model)) == 2  # what the first offset folds is not legal with the other
    assert all(node.target != "item" for graph in graphs for node in graph.graph.nodes)

"""Graphs that name a packed module by its anchor: no edit is missed, and no module is taken for another."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.func import functional_call

from bwla_compiler.backend.entry import compile_backend
from bwla_compiler.runtime.anchors import module_of
from bwla_compiler.runtime.functions import Norm
from bwla_compiler.runtime.modules import OnlineTransform, PackedLinear
from tests import tiny
from tests.packed import calibrated_qwen3 as packed
from tests.wider import wider


class Backend:
    """The backend, with the graphs that it was given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(gm)
        return compile_backend(gm, inputs)

    def compiled(self, model: nn.Module) -> Callable[..., Any]:
        """Return the model compiled."""
        run: Callable[..., Any] = torch.compile(model, backend=self, fullgraph=True)
        return run


def logits(run: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = run(tiny.ids(), use_cache=False).logits
    return found


@pytest.fixture
def backend() -> Backend:
    torch._dynamo.reset()
    return Backend()


def test_a_graph_takes_one_tensor_for_a_module(backend: Backend) -> None:
    model = packed()
    logits(backend.compiled(model))
    inputs = [node.name for node in backend.graphs[0].graph.nodes if node.op == "placeholder"]
    modules = [m for m in model.modules() if isinstance(m, (PackedLinear, OnlineTransform, Norm))]
    assert sum("anchor" in name for name in inputs) == len(modules)
    assert not any("_proj" in name and "anchor" not in name for name in inputs)


OTHERS = [{"psp.rank": 0}, *wider({"psp.rank": 4}, {"transform.kind": "hadamard"}, {"weights.planes": 2})]


@pytest.mark.parametrize("settings", OTHERS, ids=str)
@pytest.mark.parametrize("first", [True, *wider(False)])
def test_a_model_that_was_packed_otherwise_has_a_graph_of_its_own(
    settings: dict[str, Any], first: bool, backend: Backend
) -> None:
    models = [packed(), packed(**settings)]
    for model in models if first else models[::-1]:
        for _ in range(2):
            assert torch.equal(logits(backend.compiled(model)), logits(model))
    assert len(backend.graphs) == 2


def test_models_that_are_alike_share_a_graph_and_keep_their_weights(backend: Backend) -> None:
    one = packed()
    other = copy.deepcopy(one)
    linear = next(m for m in other.modules() if isinstance(m, PackedLinear))
    linear.signs.bitwise_not_()
    for _ in range(2):
        for model in (one, other):
            assert torch.equal(logits(backend.compiled(model)), logits(model))
    assert len(backend.graphs) == 1
    assert not torch.equal(logits(one), logits(other))


def past_setattr(linear: PackedLinear) -> None:
    linear._buffers["signs"] = ~linear.signs


def by_update(linear: PackedLinear) -> None:
    linear._buffers.update(signs=~linear.signs)


def by_data(linear: PackedLinear) -> None:
    linear.signs.data = ~linear.signs


def by_load(linear: PackedLinear) -> None:
    linear.load_state_dict({**linear.state_dict(), "signs": ~linear.signs}, assign=True)


@pytest.mark.parametrize("edit", [past_setattr, by_load, *wider(by_update, by_data)])
def test_no_other_tensor_goes_unseen(edit: Callable[[PackedLinear], None], backend: Backend) -> None:
    """Not even while something else holds the old one."""
    model = packed()
    run = backend.compiled(model)
    for _ in range(2):
        before = logits(run)
    linear = next(m for m in model.modules() if isinstance(m, PackedLinear))
    held = linear.signs
    for _ in range(2):
        edit(linear)
        after = logits(run)
        assert torch.equal(after, logits(model))
        assert not torch.equal(after, before)
        before = after
    assert len(backend.graphs) == 1
    assert held is not None


def test_tensors_of_one_call(backend: Backend) -> None:
    """torch.func.functional_call puts others in their place, and the old ones back."""
    model = packed()
    run = backend.compiled(model)
    for _ in range(2):
        before = logits(run)
    name, linear = next((name, m) for name, m in model.named_modules() if isinstance(m, PackedLinear))
    others = {f"{name}.signs": ~linear.signs}
    with torch.no_grad():
        found = torch.func.functional_call(run, {f"_orig_mod.{k}": v for k, v in others.items()}, (tiny.ids(),))
        want = torch.func.functional_call(model, others, (tiny.ids(),))
    torch.testing.assert_close(found.logits, want.logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found.logits, before)
    assert torch.equal(logits(run), before)


def test_copies_have_anchors_of_their_own() -> None:
    linear = next(m for m in packed().modules() if isinstance(m, PackedLinear))
    for other in (copy.copy(linear), copy.deepcopy(linear)):
        assert other.anchor is not linear.anchor
        assert module_of(other.anchor) is other
    assert module_of(linear.anchor) is linear


def test_other_backends_run_the_operators_that_take_anchors(backend: Backend) -> None:
    model = packed()
    assert backend.graphs == []
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(logits(run), logits(model), rtol=1e-5, atol=1e-5)
    linear = next(m for m in model.modules() if isinstance(m, PackedLinear))
    past_setattr(linear)
    torch.testing.assert_close(logits(run), logits(model), rtol=1e-5, atol=1e-5)


def test_functional_call_is_right_around_compiled_code_and_refused_within(backend: Backend) -> None:
    model = packed()
    name = "model.layers.0.mlp.up_proj.row_scale"
    other = {name: torch.zeros_like(model.get_buffer(name))}
    inputs = {"input_ids": tiny.ids(), "use_cache": False}
    with torch.no_grad():
        expected = functional_call(model, other, (), inputs).logits
        assert not torch.equal(expected, model(**inputs).logits)
        compiled = torch.compile(model, backend=backend)
        assert torch.equal(functional_call(compiled, {f"_orig_mod.{name}": other[name]}, (), inputs).logits, expected)
        with pytest.raises(BackendCompilerFailed, match=r"layers\.0\.mlp\.up_proj: .*functional_call around"):
            torch.compile(lambda: functional_call(model, other, (), inputs).logits, backend=backend)()

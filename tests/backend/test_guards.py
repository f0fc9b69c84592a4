"""Guards that are left out: fewer checks before a call, and still no edit of a packed weight that goes unseen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bwla_compiler.backend import entry
from bwla_compiler.backend.entry import compile_backend
from bwla_compiler.backend.guards import leave_out_guards
from bwla_compiler.backend.owner import name_of
from bwla_compiler.errors import ShapeError
from bwla_compiler.runtime.modules import PackedLinear
from tests import tiny
from tests.packed import calibrated_qwen3 as packed
from tests.wider import wider


def logits(run: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = run(tiny.ids(), use_cache=False).logits
    return found


def guarded(monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], int]:
    """Return the names of the tensors that Dynamo still checks, and how many inputs were freed of it."""
    freed: list[int] = []
    names: set[str] = set()

    def noted(gm: Any, inputs: Any) -> int:
        freed.append(leave_out_guards(gm, inputs))
        context = torch._guards.TracingContext.get()
        names.update(g.name for g in context.guards_context.dynamo_guards if g.create_fn_name() == "TENSOR_MATCH")
        return freed[-1]

    monkeypatch.setattr(entry, "leave_out_guards", noted)
    torch._dynamo.reset()
    logits(torch.compile(packed(), backend=compile_backend, fullgraph=True))
    return names, freed[0]


def test_floats_stay_guarded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names, freed = guarded(monkeypatch)
    buffers = [name for name in names if "layers" in name and "_proj" in name]
    assert buffers == []
    assert not any("norm" in name for name in names)  # their anchors stand for them
    assert any(".keys" in name or "inv_freq" in name for name in names)
    assert freed == 7 + 2 + 5  # linears, transforms, norms: an anchor each


def other(buffer: Tensor) -> Tensor:
    """Return the same values at other places, or, of one value, another."""
    return buffer.roll(1) if buffer.numel() > 1 else buffer + 1


def replace(module: PackedLinear, name: str) -> None:
    setattr(module, name, other(getattr(module, name)))


def in_place(module: PackedLinear, name: str) -> None:
    buffer = getattr(module, name)
    buffer.copy_(other(buffer))


def set_data(module: PackedLinear, name: str) -> None:
    buffer = getattr(module, name)
    buffer.data = other(buffer)


@pytest.mark.parametrize("edit", [in_place, set_data, *wider(replace)])
def test_edits_of_every_buffer_are_seen(edit: Callable[[PackedLinear, str], None]) -> None:
    model = packed()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=compile_backend, fullgraph=True)
    for _ in range(2):
        before = logits(compiled)
    for kind in ("q_proj", "down_proj"):
        linear = next(m for name, m in model.named_modules() if name.endswith(kind))
        assert isinstance(linear, PackedLinear)
        transform = linear.transform
        for module in (linear, *([transform] if transform is not None else [])):
            for name, buffer in list(module.named_buffers(recurse=False)):
                if name == "typed" or buffer.numel() == 0:
                    continue
                edit(module, name)
                after = logits(compiled)
                assert torch.equal(after, logits(model)), f"{kind}.{name}"
                assert not torch.equal(after, before), f"{kind}.{name} was not read anew"
                before = after


def test_a_scale_of_another_shape_is_refused_by_name() -> None:
    model = packed()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=compile_backend, fullgraph=True)
    for _ in range(2):
        logits(compiled)
    linear = next(m for m in model.modules() if isinstance(m, PackedLinear))
    linear.row_scale = linear.row_scale[:, :-1].clone()
    with pytest.raises(ShapeError, match="scale"):
        logits(compiled)


def test_other_signs_compile_anew() -> None:
    """Twice the planes, as another recipe gives: a change of what was compiled, which the linear tells of."""
    model = packed()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=compile_backend, fullgraph=True)
    logits(compiled)
    linear = next(m for m in model.modules() if isinstance(m, PackedLinear))
    linear.signs = torch.cat([linear.signs, linear.signs])
    linear.row_scale = torch.cat([linear.row_scale, linear.row_scale])
    assert torch.equal(logits(compiled), logits(model))


@pytest.mark.parametrize("warm", [1, 3])
def test_signs_of_another_shape_in_place_are_refused(warm: int) -> None:
    model = packed()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=compile_backend, fullgraph=True)
    for _ in range(warm):
        logits(compiled)
    linear = next(m for m in model.modules() if isinstance(m, PackedLinear))
    linear.signs.data = linear.signs[:, :-1].clone()
    with pytest.raises(ShapeError, match="compiled for"):
        logits(compiled)


def test_a_buffer_that_others_read_stays_guarded() -> None:
    """Also in a list, and as a result of the graph."""
    linear = next(m for m in packed().modules() if isinstance(m, PackedLinear) and m.rank)

    def function(x: Tensor) -> Any:
        assert linear.low_rank_out is not None
        return linear(x), torch.cat([linear.low_rank_in, linear.low_rank_in]), linear.low_rank_out

    torch._dynamo.reset()
    compiled, x = torch.compile(function, backend=compile_backend), torch.ones(2, linear.in_features)
    with torch.no_grad():
        compiled(x)
        for name, axis in (("low_rank_in", 0), ("low_rank_out", 1), ("low_rank_scale", 0)):
            setattr(linear, name, getattr(linear, name).narrow(axis, 0, 1).clone())
        for found, want in zip(compiled(x), function(x), strict=True):
            assert found.shape == want.shape
            assert torch.equal(found, want)


def test_parts_of_sealed_modules_are_guarded_by_one_guard_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, str]] = []

    def noted(gm: Any, inputs: Any) -> int:
        freed = leave_out_guards(gm, inputs)
        guards = torch._guards.TracingContext.get().guards_context.dynamo_guards
        found.extend((name_of(g.originating_source), g.create_fn_name()) for g in guards)
        return freed

    monkeypatch.setattr(entry, "leave_out_guards", noted)
    torch._dynamo.reset()
    logits(torch.compile(packed(), backend=compile_backend, fullgraph=True))
    inside = {(name.rpartition("_proj']")[2], kind) for name, kind in found if "_proj']" in name}
    parts = {(part, kind) for part, kind in inside if "HOOKS" not in kind and kind != "TENSOR_MATCH"}
    assert {part for part, _ in parts} == {"", ".facts", "._modules['transform'].facts"}
    assert {kind for part, kind in parts if part == ""} == {"TYPE_MATCH"}


def bias(linear: PackedLinear) -> None:
    linear.bias = torch.ones(linear.out_features)


def no_transform(linear: PackedLinear) -> None:
    linear.transform = None


def another_forward(linear: PackedLinear) -> None:
    plain = type(linear).forward
    linear.forward = lambda x: 2 * plain(linear, x)  # type: ignore[method-assign]


def fewer_bits(linear: PackedLinear) -> None:
    linear.activation_bits = 3


@pytest.mark.parametrize("edit", [bias, another_forward, *wider(no_transform, fewer_bits)])
def test_an_edit_of_a_part_compiles_anew(edit: Callable[[PackedLinear], None]) -> None:
    model = packed()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=compile_backend, fullgraph=True)
    for _ in range(2):
        before = logits(compiled)
    edit(next(m for m in model.modules() if isinstance(m, PackedLinear) and m.transform is not None))
    after = logits(compiled)
    torch.testing.assert_close(after, logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.equal(after, before)


def test_nothing_is_left_out_outside_of_tracing() -> None:
    assert leave_out_guards(torch.fx.symbolic_trace(nn.Identity()), [torch.ones(1)]) == 0

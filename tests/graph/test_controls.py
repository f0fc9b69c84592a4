"""Negative controls: each rule broken on purpose changes the function, so that a rule which is wrong would be seen."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Node

from bwla_compiler.graph import (
    analysis,
    basis,
    rules_arithmetic,
    rules_contraction,
    rules_indexing,
    rules_lanes,
    rules_layout,
)
from bwla_compiler.graph.analysis import Analysis, Rule, Value
from bwla_compiler.graph.spaces import Space
from tests.graph.graphs import EPS, Builder, Built, Middle, around, aten, shape

EXACT, WRONG = 1e-10, 1e-4
"""Relative errors: float64 rounding through ten operations is 1e-14, a rotation in the wrong place 1e-2 and more."""

RULE_FILES = (analysis, rules_arithmetic, rules_contraction, rules_indexing, rules_lanes, rules_layout)


# ---- ways to break a rule


@contextmanager
def replaced(names: dict[str, Any]) -> Iterator[None]:
    """Let the rules see other functions under the names that constrain and unify spaces."""
    with pytest.MonkeyPatch.context() as patch:
        for file in RULE_FILES:
            for name, function in names.items():
                if hasattr(file, name):
                    patch.setattr(file, name, function)
        yield


def nothing(*args: object, **kwargs: object) -> None:
    """Instead of a constraint."""


def unpinned(rule: Rule) -> Rule:
    """The rule takes no freedom away, and what it makes is free."""

    def broken(a: Analysis, node: Any) -> bool:
        free = {"pin": nothing, "constrain": nothing, "pinned": lambda size, reason: Space(size)}
        with replaced(free):
            return rule(a, node)

    return broken


def ununified(rule: Rule) -> Rule:
    """The rule lets spaces differ that must be equal."""

    def broken(a: Analysis, node: Any) -> bool:
        with replaced({"unify": nothing}):
            return rule(a, node)

    return broken


def detached(rule: Rule) -> Rule:
    """The rule forgets that its result has anything to do with its operands."""

    def broken(a: Analysis, node: Any) -> bool:
        done = rule(a, node)
        value = a.values[node]
        fresh = [Value([Space(x.size) for x in v.axes], v.squared) for v in (value, *value.items)]
        a.values[node] = Value(fresh[0].axes, fresh[0].squared, fresh[1:])
        return done

    return broken


def unguarded(rule: Rule) -> Rule:
    """Squares that nobody knows to be squares."""

    def broken(a: Analysis, node: Any) -> bool:
        done = rule(a, node)
        a.values[node].squared = False
        return done

    return broken


def as_zeros(rule: Rule) -> Rule:
    """Every constant is taken for zeros, which are zeros in any basis."""

    def broken(a: Analysis, node: Any) -> bool:
        a.values[node] = Value([Space(s) for s in a.shape(node)])
        return True

    return broken


def only_linears(self: Analysis, node: Any) -> tuple[Node, ...]:
    """Readers of a gain: whoever is a linear, whoever else there is."""
    return tuple(user for user in node.users if self.linear_operands(user) is not None)


def any_gain(self: Analysis, node: Node) -> tuple[str, float] | None:
    """A gain's parameter, whatever else reads it and whatever is computed from it."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    name = self.parameter_of(node)
    return (name, 0.0) if name else None


# ---- small graphs


def heads(b: Builder, x: Node, *, n_heads: int = 2, size: int = 4, masked: bool = False) -> Node:
    q, k, v = (
        b.call(aten.transpose.int, b.call(aten.view.default, b.linear(x, n_heads * size), [2, 3, n_heads, size]), 1, 2)
        for _ in range(3)
    )
    if masked:
        scores = b.call(aten.matmul.default, q, b.call(aten.transpose.int, k, 2, 3))
        out = b.call(aten.matmul.default, b.call(aten.softmax.int, scores, -1), v)
    else:
        out = b.call(aten.scaled_dot_product_attention.default, q, k, v)
    flat = b.call(aten.clone.default, b.call(aten.transpose.int, out, 1, 2), memory_format=torch.contiguous_format)
    return b.call(aten.view.default, flat, [2, 3, n_heads * size])


def lanes(b: Builder, x: Node) -> Node:
    fused = b.call(aten.view.default, b.linear(x, 24), [2, 3, 2, 3, 4])
    q, k, v = (b.call(aten.select.int, fused, 3, i) for i in range(3))
    mixed = b.call(aten.mul.Tensor, b.call(aten.tanh.default, q), b.call(aten.silu.default, k))
    flat = b.call(aten.reshape.default, v, [2, 3, 8])
    return b.call(aten.add.Tensor, b.linear(flat, 8), b.linear(b.call(aten.reshape.default, mixed, [2, 3, 8]), 8))


def two_lanes(b: Builder, x: Node) -> Node:
    fused = b.call(aten.view.default, b.linear(x, 24), [2, 3, 2, 3, 4])
    taken = b.call(aten.reshape.default, b.call(aten.slice.Tensor, fused, 3, 0, 2), [2, 3, 16])
    left = b.call(aten.reshape.default, b.call(aten.select.int, fused, 3, 2), [2, 3, 8])
    return b.call(aten.add.Tensor, b.linear(taken, 8), left)


def other(b: Builder) -> Node:
    """Another stream of the same shape."""
    return b.embed(8)


def first(b: Builder, items: Node) -> Node:
    return b.call(operator.getitem, items, 0)


def split(b: Builder, x: Node) -> Node:
    return first(b, b.call(aten.split_with_sizes.default, x, [5, 3], -1))


def gained(b: Builder, x: Node) -> Node:
    return b.call(aten.mul.Tensor, b.rms(x), b.parameter(b.random(8)))


def gain_and_more(b: Builder, x: Node) -> Node:
    y = gained(b, x)
    return b.call(aten.add.Tensor, b.linear(y, 8), b.call(aten.silu.default, y))


def gain_of_two(b: Builder, x: Node) -> Node:
    gain = b.parameter(b.random(8))
    y = b.linear(b.call(aten.mul.Tensor, b.rms(x), gain), 8)
    return b.call(aten.silu.default, b.call(aten.mul.Tensor, b.call(aten.silu.default, y), gain))


def squared_gain(b: Builder, x: Node) -> Node:
    return b.call(aten.mul.Tensor, b.rms(x), b.call(aten.square.default, b.parameter(b.random(8))))


def doubled_gain(b: Builder, x: Node) -> Node:
    return b.call(aten.mul.Tensor, b.rms(x), b.call(aten.mul.Tensor, b.parameter(b.random(8)), 2.0))


def mask(b: Builder, *sizes: int) -> Node:
    return b.buffer(torch.arange(1, torch.Size(sizes).numel() + 1).reshape(sizes) % 2 == 0)


def grouped(b: Builder, x: Node) -> Node:
    rows = b.call(aten.view.default, x, [6, 8])
    weight = b.parameter(b.random(2, 8, 8))
    ends = b.buffer(torch.tensor([4, 6], dtype=torch.int32))
    return b.call(aten.view.default, b.call(grouped_product, rows, weight, ends), [2, 3, 8])


def _grouped_product() -> Any:
    import transformers.integrations.moe  # noqa: F401

    return torch.ops.transformers.grouped_mm_fallback.default


grouped_product = _grouped_product()


def op(target: Any, *args: Any, **kwargs: Any) -> Middle:
    return lambda b, x: b.call(target, x, *args, **kwargs)


def with_other(target: Any, *args: Any) -> Middle:
    return lambda b, x: b.call(target, x, other(b), *args)


def column(b: Builder, x: Node) -> Node:
    """[2, 3, 1]."""
    return b.linear(x, 1)


@dataclass(frozen=True)
class Control:
    """One way to break the rule of `target`, and a graph whose function it changes."""

    target: Any
    breakage: Callable[[Rule], Rule]
    middle: Middle

    def __str__(self) -> str:
        return f"{self.target}-{self.breakage.__name__}"


CONTROLS = (
    # contractions
    Control(aten.linear.default, ununified, lambda b, x: b.linear(x, 8)),
    Control(aten.linear.default, detached, lambda b, x: b.linear(x, 8)),
    Control(aten.addmm.default, ununified, lambda b, x: b.conv1d(x, 8)),
    Control(aten.addmm.default, detached, lambda b, x: b.conv1d(x, 8)),
    Control(aten.matmul.default, ununified, lambda b, x: b.matmul_weight(x, 8)),
    Control(aten.matmul.default, ununified, lambda b, x: heads(b, x, masked=True)),
    Control(aten.matmul.default, unpinned, lambda b, x: heads(b, x, masked=True)),
    Control(
        aten.baddbmm.default,
        ununified,
        lambda b, x: b.call(aten.baddbmm.default, b.parameter(b.random(1, 1, 8)), b.buffer(b.random(2, 3, 3)), x),
    ),
    Control(aten.einsum.default, ununified, lambda b, x: b.call(aten.einsum.default, "bid,bjd->bij", [x, other(b)])),
    Control(aten.einsum.default, unpinned, lambda b, x: b.call(aten.einsum.default, "bid,bid->bid", [x, other(b)])),
    Control(aten.embedding.default, unpinned, lambda b, x: x),
    Control(aten.embedding.default, detached, lambda b, x: x),
    Control(aten.scaled_dot_product_attention.default, unpinned, heads),
    Control(aten.scaled_dot_product_attention.default, ununified, heads),
    Control(aten.scaled_dot_product_attention.default, detached, heads),
    Control(grouped_product, ununified, grouped),
    Control(grouped_product, unpinned, grouped),
    # layout
    Control(aten.clone.default, detached, op(aten.clone.default)),
    Control(
        aten.to.dtype,
        unpinned,
        lambda b, x: b.call(aten.to.dtype, b.call(aten.to.dtype, x, torch.int64), torch.float64),
    ),
    Control(aten.neg.default, detached, op(aten.neg.default)),
    Control(aten.view.default, detached, lambda b, x: b.call(aten.view.default, x, [6, 8])),
    Control(aten.view.default, ununified, lanes),
    Control(aten.permute.default, detached, op(aten.permute.default, [1, 0, 2])),
    Control(aten.unsqueeze.default, detached, op(aten.unsqueeze.default, 1)),
    Control(aten.squeeze.dim, detached, lambda b, x: b.call(aten.squeeze.dim, b.call(aten.unsqueeze.default, x, 0), 0)),
    Control(aten.expand.default, unpinned, lambda b, x: b.call(aten.expand.default, column(b, x), [2, 3, 8])),
    Control(aten.expand.default, detached, op(aten.expand.default, [2, 2, 3, 8])),
    Control(aten.copy.default, detached, with_other(aten.copy.default)),
    Control(aten.repeat.default, unpinned, op(aten.repeat.default, [1, 1, 2])),
    Control(aten.repeat.default, detached, op(aten.repeat.default, [1, 1, 2])),
    Control(aten.repeat_interleave.self_int, unpinned, op(aten.repeat_interleave.self_int, 2, -1)),
    Control(aten.repeat_interleave.self_int, detached, op(aten.repeat_interleave.self_int, 2, -1)),
    Control(aten.slice.Tensor, detached, op(aten.slice.Tensor, -1, 2, 7)),
    Control(aten.slice.Tensor, unpinned, op(aten.slice.Tensor, -1, 0, 8, 2)),
    Control(aten.slice.Tensor, ununified, two_lanes),
    Control(aten.split_with_sizes.default, detached, split),
    Control(operator.getitem, detached, split),
    Control(aten.cat.default, detached, lambda b, x: b.call(aten.cat.default, [x, other(b)], -1)),
    Control(aten.cat.default, ununified, lambda b, x: b.call(aten.cat.default, [x, other(b)], 1)),
    Control(aten.stack.default, unpinned, lambda b, x: b.call(aten.stack.default, [x, other(b)], -1)),
    Control(aten.stack.default, ununified, lambda b, x: b.call(aten.stack.default, [x, other(b)], 0)),
    Control(aten.pad.default, unpinned, op(aten.pad.default, [0, 0, 1, 0], "constant", 0.5)),
    Control(aten.pad.default, detached, op(aten.pad.default, [1, 1], "constant", None)),
    Control(
        aten.slice_scatter.default,
        detached,
        lambda b, x: b.call(aten.slice_scatter.default, x, b.linear(x, 3), -1, 1, 4),
    ),
    Control(
        aten.slice_scatter.default,
        ununified,
        lambda b, x: b.call(aten.slice_scatter.default, x, b.call(aten.slice.Tensor, other(b), 1, 0, 1), 1, 1, 2),
    ),
    # indexing
    Control(aten.index.Tensor, unpinned, lambda b, x: b.call(aten.index.Tensor, x, [None, None, numbers(b)])),
    Control(aten.index.Tensor, detached, lambda b, x: b.call(aten.index.Tensor, x, [None, numbers(b)])),
    Control(aten.index_select.default, unpinned, lambda b, x: b.call(aten.index_select.default, x, 2, numbers(b))),
    Control(aten.select.int, unpinned, op(aten.select.int, -1, 0)),
    Control(aten.select.int, detached, op(aten.select.int, 1, 0)),
    Control(aten.unbind.int, unpinned, lambda b, x: first(b, b.call(aten.unbind.int, x, -1))),
    Control(
        aten.select_scatter.default,
        unpinned,
        lambda b, x: b.call(aten.select_scatter.default, x, b.call(aten.select.int, column(b, x), 2, 0), 2, 3),
    ),
    Control(
        aten.select_scatter.default,
        ununified,
        lambda b, x: b.call(aten.select_scatter.default, x, b.call(aten.select.int, other(b), 1, 0), 1, 2),
    ),
    Control(aten.cumsum.default, unpinned, op(aten.cumsum.default, -1)),
    Control(aten.flip.default, unpinned, op(aten.flip.default, [-1])),
    Control(aten.roll.default, unpinned, op(aten.roll.default, [1], [-1])),
    Control(aten.tril.default, unpinned, op(aten.tril.default)),
    Control(aten.masked_fill.Scalar, unpinned, lambda b, x: b.call(aten.masked_fill.Scalar, x, mask(b, 8), 0)),
    Control(aten.masked_fill.Scalar, unpinned, lambda b, x: b.call(aten.masked_fill.Scalar, x, mask(b, 3, 1), 1.5)),
    Control(aten.where.self, unpinned, lambda b, x: b.call(aten.where.self, mask(b, 8), x, other(b))),
    Control(aten.where.self, ununified, lambda b, x: b.call(aten.where.self, mask(b, 3, 1), x, other(b))),
    Control(aten.ones_like.default, as_zeros, op(aten.ones_like.default)),
    # arithmetic
    Control(aten.add.Tensor, ununified, with_other(aten.add.Tensor)),
    Control(aten.add.Tensor, unpinned, lambda b, x: b.call(aten.add.Tensor, x, column(b, x))),
    Control(aten.mul.Tensor, unpinned, with_other(aten.mul.Tensor)),
    Control(aten.mul.Tensor, detached, op(aten.mul.Tensor, 2.0)),
    Control(aten.div.Tensor, unpinned, lambda b, x: b.call(aten.div.Tensor, column(b, x), x)),
    Control(aten.pow.Tensor_Scalar, unguarded, op(aten.pow.Tensor_Scalar, 2)),
    Control(aten.pow.Tensor_Scalar, unpinned, op(aten.pow.Tensor_Scalar, 3)),
    Control(aten.mean.dim, unpinned, op(aten.mean.dim, [-1], True)),
    Control(aten.mean.dim, unpinned, lambda b, x: b.call(aten.mean.dim, b.call(aten.square.default, x), [1])),
    Control(aten.linalg_vector_norm.default, unpinned, op(aten.linalg_vector_norm.default, 2, [1])),
    Control(aten.linalg_vector_norm.default, unpinned, op(aten.linalg_vector_norm.default, 1, [-1], True)),
    Control(aten.var.correction, unpinned, op(aten.var.correction, [-1], keepdim=True)),
    Control(aten.layer_norm.default, unpinned, op(aten.layer_norm.default, [8], None, None, EPS)),
    Control(aten.layer_norm.default, detached, op(aten.layer_norm.default, [8], None, None, EPS)),
    Control(
        aten.rms_norm.default,
        unpinned,
        lambda b, x: b.call(aten.add.Tensor, x, b.call(aten.rms_norm.default, x, [8], b.parameter(b.random(8)), EPS)),
    ),
    # what only the identity commutes with
    Control(aten.silu.default, unpinned, op(aten.silu.default)),
    Control(aten.softmax.int, unpinned, op(aten.softmax.int, -1)),
    Control(aten.gather.default, unpinned, lambda b, x: b.call(aten.gather.default, x, 2, numbers(b, 1, 1, 3))),
    Control(
        aten.conv1d.default,
        unpinned,
        lambda b, x: b.call(aten.conv1d.default, x, b.parameter(b.random(3, 1, 1)), None, [1], [0], [1], 3),
    ),
    Control(
        aten.view_as_complex.default,
        unpinned,
        lambda b, x: b.call(
            aten.view_as_real.default,
            b.call(
                aten.mul.Tensor, b.call(aten.view_as_complex.default, b.call(aten.view.default, x, [2, 3, 4, 2])), 1j
            ),
        ),
    ),
)
"""At least one of every kind of operation that has a rule."""


def numbers(b: Builder, *sizes: int) -> Node:
    return b.buffer(torch.tensor([2, 0, 1]).reshape(sizes or (3,)))


@pytest.mark.parametrize("control", CONTROLS, ids=str)
def test_a_broken_rule_changes_the_function(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, _ = around(control.middle).error_after_rotations()
    assert sound <= EXACT
    key = control.target if control.target in basis.RULES else str(control.target)
    monkeypatch.setitem(basis.RULES, key, control.breakage(basis.RULES[key]))
    broken, _ = around(control.middle).error_after_rotations()
    assert not broken < WRONG


def test_every_kind_of_operation_has_a_control() -> None:
    controlled = {t for c in CONTROLS for t in (c.target, str(c.target))}
    missing = [sorted(map(str, targets))[:3] for targets, _ in basis.KINDS if not controlled & set(targets)]
    assert not missing, f"no control for {missing}: add one to CONTROLS"


def test_every_file_of_rules_can_be_broken() -> None:
    """`unpinned` and `ununified` must reach a file that is added later."""
    from importlib import resources

    files = {p.name for p in resources.files("bwla_compiler.graph").iterdir() if p.name.startswith("rules_")}
    assert files == {f"{file.__name__.rpartition('.')[2]}.py" for file in RULE_FILES[1:]}


# ---- what may be absorbed


@pytest.mark.parametrize(
    "name, breakage, middle",
    [
        ("linear_readers", only_linears, gain_and_more),
        ("gain_parameter", any_gain, gain_of_two),
        ("gain_parameter", any_gain, squared_gain),
        ("_number_added", lambda node: 1.0, doubled_gain),
    ],
)
def test_a_gain_absorbed_where_it_must_not_be_changes_the_function(
    name: str, breakage: Any, middle: Middle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, _ = around(middle).error_after_rotations()
    assert sound <= EXACT
    monkeypatch.setattr(Analysis if hasattr(Analysis, name) else analysis, name, breakage)
    broken, _ = around(middle).error_after_rotations()
    assert not broken < WRONG


def shared_bias() -> Built:
    """Two linears with one bias; a norm's shift may not move into it."""
    b = Builder()
    x = b.embed(8)
    shifted = b.call(aten.layer_norm.default, x, [8], None, b.parameter(b.random(8)), EPS)
    one, two = b.new_linear(8, 6), b.new_linear(8, 6)
    b.root.get_submodule(two).bias = b.root.get_submodule(one).bias
    return b.finish(b.linear(shifted, module=one), b.linear(x, module=two))


def two_heads() -> Built:
    """Two heads tied to one embedding: neither may get a copy of its own."""
    b = Builder()
    x = b.embed(8)
    weight = b.root.get_parameter("m0.weight")
    found = []
    for _ in range(2):
        head = nn.Linear(8, shape(x)[0], bias=False)
        head.weight = weight
        found.append(b.linear(gained(b, x), module=b.add_module(head)))
    return b.finish(*(b.linear(logits, 4) for logits in found))


@pytest.mark.parametrize(
    "build, name, breakage",
    [
        (shared_bias, "without_bias", lambda self, readers: ""),
        (two_heads, "may_untie", lambda self, name: True),
    ],
)
def test_a_parameter_of_two_modules_is_changed_for_neither(
    build: Callable[[], Built], name: str, breakage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, _ = build().error_after_rotations()
    assert sound <= EXACT
    monkeypatch.setattr(Analysis, name, breakage)
    broken, _ = build().error_after_rotations()
    assert not broken < WRONG


def test_one_head_called_twice_is_rotated_once() -> None:
    b = Builder()
    x = b.embed(8)
    head = nn.Linear(8, 16, bias=False)
    head.weight = b.root.get_parameter("m0.weight")
    name = b.add_module(head)
    built = b.finish(*(b.linear(t, module=name) for t in (x, b.rms(x))))
    error, plan = built.error_after_rotations()
    assert error <= EXACT
    assert [axis for axis in plan.axes if axis.parameter == f"{name}.weight" and axis.axis == 0] == []

"""Random small graphs from the table of rules: each step is one operation, or a few that models use together."""

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch.fx import Node

from tests.graph.graphs import EPS, Builder, Built, aten, shape

WIDTHS = (4, 6, 8, 12)
LARGEST = 50.0
"""Values beyond it are squashed, so that rounding stays rounding."""

MAX_NUMEL = 3000


class Grower:
    """Draws operations and their operands from what is there already."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.b = Builder(data.draw(st.integers(0, 3), label="seed"))
        self.pool: list[Node] = []
        self.read: set[Node] = set()
        self.tables: list[str] = []
        self.linears: list[str] = []
        self.gains: list[Node] = []

    # ---- drawing

    def choose(self, options: Any) -> Any:
        return self.data.draw(st.sampled_from(list(options)))

    def number(self) -> float:
        return self.choose((0.5, -1.0, 2.0))

    def pick(self, fits: Callable[[Node], bool] = lambda n: True) -> Node | None:
        """An operand, the newest most often."""
        found = [n for n in reversed(self.pool) if fits(n)]
        if not found:
            return None
        node = found[0] if self.data.draw(st.booleans()) else self.choose(found)
        self.read.add(node)
        return node

    def axis(self, x: Node, *, last_too: bool = True) -> int:
        return self.choose(range(len(shape(x)) - (not last_too)))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.b.call(target, *args, **kwargs)

    def push(self, node: Node | None) -> None:
        if node is None:
            return
        value = node.meta["val"]
        if value.numel() > MAX_NUMEL or value.numel() == 0 or value.ndim > 5:
            return
        if float(value.abs().max()) > LARGEST:
            node = self.call(aten.tanh.default, node)
        self.pool.append(node)

    # ---- what may happen

    def embed(self) -> None:
        table = self.b.embed(self.choose(WIDTHS))
        self.tables.append(str(table.args[0].target).removeprefix("model."))  # type: ignore[union-attr]
        self.push(table)

    def linear(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim >= 2)
        if x is None:
            return
        how, n_out = self.choose(("linear", "biasless", "conv1d", "matmul")), self.choose(WIDTHS)
        if how == "conv1d":
            self.push(self.b.conv1d(x, n_out))
        elif how == "matmul":
            self.push(self.b.matmul_weight(x, n_out))
        else:
            node = self.b.linear(x, n_out, bias=how == "linear")
            self.linears.append(str(node.args[1].target).removeprefix("model.").rpartition(".")[0])  # type: ignore[union-attr]
            self.push(node)

    def linear_again(self) -> None:
        """A module that is called a second time."""
        if self.linears:
            module = self.choose(self.linears)
            width = self.b.root.get_submodule(module).in_features
            x = self.pick(lambda n: shape(n)[-1:] == [width])
            self.push(self.b.linear(x, module=module) if x is not None else None)

    def tied(self) -> None:
        """A head that shares an embedding's tensor."""
        if not self.tables:
            return
        table = self.choose(self.tables)
        weight = self.b.root.get_parameter(table)
        x = self.pick(lambda n: shape(n)[-1:] == [weight.shape[1]])
        if x is None:
            return
        head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        head.weight = weight
        self.push(self.b.linear(x, module=self.b.add_module(head)))

    def shared(self) -> None:
        """Two linears, or two calls of one."""
        self.linear()
        self.linear_again()

    def add(self) -> None:
        x = self.pick()
        y = self.pick(lambda n: x is not None and self._broadcasts(x, n))
        if x is not None and y is not None:
            self.push(self.call(self.choose((aten.add.Tensor, aten.sub.Tensor)), x, y))

    def residual(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim >= 2)
        if x is not None:
            y = self.b.linear(self.b.rms(x) if self.choose((True, False)) else x, shape(x)[-1])
            self.push(self.call(aten.add.Tensor, x, y))

    def mul(self) -> None:
        x = self.pick()
        y = self.pick(lambda n: x is not None and self._broadcasts(x, n))
        if x is not None and y is not None:
            self.push(self.call(aten.mul.Tensor, x, y))

    def div(self) -> None:
        x = self.pick()
        y = self.pick(lambda n: x is not None and self._broadcasts(x, n))
        if x is not None and y is not None:
            positive = self.call(aten.add.Tensor, self.call(aten.sigmoid.default, y), 0.5)
            self.push(self.call(aten.div.Tensor, x, positive))

    def scalar(self) -> None:
        x = self.pick()
        if x is not None:
            target = self.choose((aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor))
            self.push(self.call(target, x, self.number()))

    def negate(self) -> None:
        x = self.pick()
        self.push(self.call(self.choose((aten.neg.default, aten.clone.default)), x) if x is not None else None)

    def constant(self) -> None:
        """A parameter along some of the last axes, added or multiplied: a bias, a gain, positions."""
        x = self.pick()
        if x is None or not shape(x):
            return
        n = self.data.draw(st.integers(1, len(shape(x))))
        sizes = [s if self.choose((True, True, False)) else 1 for s in shape(x)[-n:]]
        kind = self.choose((self.b.parameter, self.b.buffer))
        self.push(self.call(self.choose((aten.mul.Tensor, aten.add.Tensor)), x, kind(self.b.random(*sizes))))

    def gain(self) -> None:
        """An RMSNorm's gain, or Gemma's (one plus it), sometimes one that another norm has."""
        x = self.pick(lambda n: n.meta["val"].ndim >= 1)
        if x is None:
            return
        same = [g for g in self.gains if shape(g) == shape(x)[-1:]]
        gain = self.choose(same) if same and self.choose((True, False)) else None
        if gain is None:
            gain = self.b.parameter(self.b.random(shape(x)[-1]))
            if self.choose((True, False)):
                gain = self.call(self.choose((aten.add.Tensor, aten.mul.Tensor)), gain, 1.0)
            self.gains.append(gain)
        order = (x, gain) if self.choose((True, False)) else (gain, x)
        self.push(self.call(aten.mul.Tensor, *order))

    def rms(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim >= 1)
        self.push(self.b.rms(x) if x is not None else None)

    def layer_norm(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim >= 1 and shape(n)[-1] > 1)
        if x is None:
            return
        width = shape(x)[-1]
        gain, shift = (self.b.parameter(self.b.random(width)) if self.choose((True, False)) else None for _ in "gs")
        if self.choose((True, False)):
            self.push(self.call(aten.layer_norm.default, x, [width], gain, shift, EPS))
        else:
            self.push(self.call(aten.rms_norm.default, x, [width], gain, EPS))

    def centred(self) -> None:
        """LayerNorm spelled out."""
        x = self.pick(lambda n: n.meta["val"].ndim >= 1)
        if x is not None:
            self.push(self.b.rms(self.call(aten.sub.Tensor, x, self.call(aten.mean.dim, x, [-1], True))))

    def reduce(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim >= 2)
        if x is None:
            return
        dims, keep = [self.axis(x)], self.choose((True, False))
        if self.choose((True, False)):
            x = self.call(self.choose((aten.square.default, aten.neg.default)), x)
        self.push(self.call(self.choose((aten.mean.dim, aten.sum.dim_IntList)), x, dims, keep))

    def measure(self) -> None:
        """Sizes of vectors and spreads of channels."""
        x = self.pick(lambda n: n.meta["val"].ndim >= 2 and shape(n)[-1] > 1)
        if x is None:
            return
        dim, keep = [self.choose((-1, 0))], self.choose((True, False))
        if shape(x)[dim[0]] < 2:
            return
        if self.choose((True, False)):
            self.push(self.call(aten.linalg_vector_norm.default, x, 2, dim, keep))
        else:
            self.push(self.call(aten.var.correction, x, dim, keepdim=keep))

    def pointwise(self) -> None:
        x = self.pick()
        names = ("silu", "tanh", "relu", "gelu", "sigmoid", "square", "abs", "sign")
        self.push(self.call(getattr(aten, self.choose(names)).default, x) if x is not None else None)

    def softmax(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim >= 1)
        self.push(self.call(aten.softmax.int, x, -1) if x is not None else None)

    def along(self) -> None:
        """Operations that work along one axis."""
        x = self.pick(lambda n: n.meta["val"].ndim >= 1)
        if x is None:
            return
        at = self.axis(x)
        size = shape(x)[at]
        how = self.choose(("cumsum", "flip", "roll", "select", "index_select", "unbind", "repeat_interleave"))
        if how == "cumsum":
            node = self.call(aten.cumsum.default, x, at)
        elif how == "flip":
            node = self.call(aten.flip.default, x, [at])
        elif how == "roll":
            node = self.call(aten.roll.default, x, [1], [at])
        elif how == "select":
            node = self.call(aten.select.int, x, at, self.choose((0, -1)))
        elif how == "index_select":
            node = self.call(aten.index_select.default, x, at, self.b.buffer(torch.tensor([size - 1, 0])))
        elif how == "unbind":
            items = self.call(aten.unbind.int, x, at)
            node = self._item(items, self.choose(range(size)))
        else:
            node = self.call(aten.repeat_interleave.self_int, x, 2, at)
        self.push(node)

    def view(self) -> None:
        """Split an axis in two, or merge two neighbours, or mix the axes up."""
        x = self.pick(lambda n: n.meta["val"].ndim >= 1)
        if x is None:
            return
        sizes, at = shape(x), self.axis(x)
        how = self.choose(("split", "merge", "mix"))
        if how == "split":
            factor = self.choose([f for f in range(1, sizes[at] + 1) if sizes[at] % f == 0])
            new = [*sizes[:at], factor, sizes[at] // factor, *sizes[at + 1 :]]
        elif how == "merge" and at + 1 < len(sizes):
            new = [*sizes[:at], sizes[at] * sizes[at + 1], *sizes[at + 2 :]]
        else:
            total = math.prod(sizes)
            first = self.choose([f for f in range(1, total + 1) if total % f == 0])
            new = [first, total // first]
        self.push(self.call(self.choose((aten.view.default, aten.reshape.default)), self.contiguous(x), new))

    def contiguous(self, x: Node) -> Node:
        return (
            x
            if x.meta["val"].is_contiguous()
            else self.call(aten.clone.default, x, memory_format=torch.contiguous_format)
        )

    def permute(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim >= 2)
        if x is not None:
            order = self.data.draw(st.permutations(range(len(shape(x)))))
            self.push(self.call(aten.permute.default, x, list(order)))

    def squeeze(self) -> None:
        x = self.pick()
        if x is None:
            return
        ones = [i for i, s in enumerate(shape(x)) if s == 1]
        if ones and self.choose((True, False)):
            self.push(self.call(aten.squeeze.dim, x, self.choose(ones)))
        else:
            self.push(self.call(aten.unsqueeze.default, x, self.choose(range(-1, len(shape(x)) + 1))))

    def repeat(self) -> None:
        x = self.pick()
        if x is None:
            return
        sizes = shape(x)
        if self.choose((True, False)):
            new = [self.choose((2, 3)) if s == 1 else s for s in sizes]
            self.push(self.call(aten.expand.default, x, new if self.choose((True, False)) else [2, *new]))
        else:
            self.push(self.call(aten.repeat.default, x, [self.choose((1, 1, 2)) for _ in sizes]))

    def slice(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim >= 1)
        if x is None:
            return
        at = self.axis(x)
        size = shape(x)[at]
        start = self.data.draw(st.integers(0, size - 1))
        end = self.data.draw(st.integers(start + 1, size))
        self.push(
            self.call(aten.slice.Tensor, x, at, start, self.choose((end, end - size or end)), self.choose((1, 1, 2)))
        )

    def split(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim >= 1 and shape(n)[-1] >= 2)
        if x is None:
            return
        size = shape(x)[-1]
        how = self.choose(("sizes", "size", "chunk"))
        if how == "sizes":
            first = self.data.draw(st.integers(1, size - 1))
            parts = self.call(aten.split_with_sizes.default, x, [first, size - first], -1)
        elif how == "size":
            parts = self.call(aten.split.Tensor, x, self.choose(range(1, size)), -1)
        else:
            parts = self.call(aten.chunk.default, x, 2, -1)
        for i in range(min(3, len(parts.meta["val"]))):
            self.push(self._item(parts, i))

    def _item(self, items: Node, i: int) -> Node:
        import operator

        return self.call(operator.getitem, items, i)

    def join(self) -> None:
        """cat or stack of tensors whose other axes agree, a tensor with itself included."""
        x = self.pick(lambda n: n.meta["val"].ndim >= 1)
        if x is None:
            return
        at = self.axis(x)

        def fits(n: Node) -> bool:
            return len(shape(n)) == len(shape(x)) and all(
                i == at or a == b for i, (a, b) in enumerate(zip(shape(n), shape(x), strict=True))
            )

        y = self.pick(fits)
        assert y is not None
        if shape(x) == shape(y) and self.choose((True, False)):
            self.push(self.call(aten.stack.default, [x, y], self.choose((at, -1))))
        else:
            self.push(self.call(aten.cat.default, [x, y], self.choose((at, at - len(shape(x))))))

    def rotary(self) -> None:
        """cat(-second half, first half), as rotary embeddings do."""
        x = self.pick(lambda n: n.meta["val"].ndim >= 1 and shape(n)[-1] % 2 == 0)
        if x is None:
            return
        half = shape(x)[-1] // 2
        first = self.call(aten.slice.Tensor, x, -1, 0, half)
        second = self.call(aten.slice.Tensor, x, -1, half, 2**63 - 1)
        self.push(self.call(aten.cat.default, [self.call(aten.neg.default, second), first], -1))

    def write(self) -> None:
        """A slice of one tensor, or of zeros, replaced by another tensor; padding."""
        x = self.pick(lambda n: n.meta["val"].ndim >= 1 and shape(n)[-1] >= 2)
        if x is None:
            return
        size = shape(x)[-1]
        cut = self.data.draw(st.integers(1, size - 1))
        how = self.choose(("slice_scatter", "zeros", "pad", "select_scatter"))
        if how == "pad":
            self.push(self.call(aten.pad.default, x, [self.choose((0, 1)), cut], "constant", self.choose((None, 0.5))))
            return
        target = self.call(aten.zeros_like.default, x) if how == "zeros" else self.pick(lambda n: shape(n) == shape(x))
        assert target is not None
        if how == "select_scatter":
            source = self.call(aten.select.int, x, 0, 0)
            self.push(self.call(aten.select_scatter.default, target, source, 0, shape(x)[0] - 1))
            return
        source = self.call(aten.slice.Tensor, x, -1, 0, cut)
        self.push(self.call(aten.slice_scatter.default, target, source, -1, size - cut, size))

    def copy(self) -> None:
        x = self.pick()
        y = self.pick(lambda n: x is not None and shape(n) == shape(x))
        if x is not None and y is not None:
            self.push(self.call(aten.copy.default, x, y))

    def index(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim >= 2)
        if x is None:
            return
        at = self.axis(x)
        rows = torch.tensor([shape(x)[at] - 1, 0, 0])
        rows = rows if self.choose((True, False)) else rows[None]
        indices: list[Node | None] = [None] * at + [self.b.buffer(rows)]
        if at + 1 < len(shape(x)) and self.choose((True, False)):
            indices.append(self.b.buffer(torch.zeros(1, dtype=torch.int64)))
        self.push(self.call(aten.index.Tensor, x, indices))

    def mask(self) -> None:
        """masked_fill and where, the mask along some axes only, from a buffer or from an activation."""
        x = self.pick(lambda n: n.meta["val"].ndim >= 1)
        if x is None:
            return
        sizes = [s if self.choose((True, False)) else 1 for s in shape(x)]
        mask = self.b.buffer(torch.rand(sizes, generator=self.b.generator) < 0.5)
        how = self.choose(("fill", "where", "tril", "compare"))
        if how == "compare":
            mask = self.call(aten.gt.Scalar, x, 0.1)
        if how == "tril":
            self.push(self.call(aten.tril.default, x) if len(shape(x)) >= 2 else None)
        elif how == "where":
            y = self.pick(lambda n: self._broadcasts(x, n))
            self.push(self.call(aten.where.self, mask, x, y))
        else:
            self.push(self.call(aten.masked_fill.Scalar, x, mask, self.choose((0, 0.0, 1.5))))

    def matmul(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim == 3)
        y = self.pick(lambda n: x is not None and n.meta["val"].ndim == 3 and shape(n)[0] == shape(x)[0])
        if x is None or y is None:
            return
        if shape(x)[-1] == shape(y)[-1]:
            y = self.call(aten.transpose.int, y, 1, 2)
        if shape(x)[-1] == shape(y)[-2]:
            if self.choose((True, False)):
                start = self.b.parameter(self.b.random(shape(x)[1], shape(y)[2])[None])
                self.push(self.call(aten.baddbmm.default, start, x, y))
            else:
                self.push(self.call(self.choose((aten.bmm.default, aten.matmul.default)), x, y))

    def einsum(self) -> None:
        x = self.pick(lambda n: n.meta["val"].ndim == 3)
        y = self.pick(lambda n: x is not None and n.meta["val"].ndim == 3 and shape(n)[0] == shape(x)[0])
        if x is not None and y is not None and shape(x)[2] == shape(y)[2]:
            self.push(
                self.call(aten.einsum.default, self.choose(("bid,bjd->bij", "bid, bjd -> bijd", "bid,bjd->id")), [x, y])
            )

    def attention(self) -> None:
        """Queries, keys and values of one input, keys and values with fewer heads, fused in one linear or not."""
        x = self.pick(lambda n: shape(n)[:-1] == [2, 3])
        if x is None:
            return
        heads, groups, size = self.choose(((2, 1, 4), (2, 2, 3), (4, 2, 2)))
        if self.choose((True, False)):
            fused = self.b.linear(x, (heads + 2 * groups) * size)
            parts = self.call(aten.split_with_sizes.default, fused, [heads * size, groups * size, groups * size], -1)
            q, k, v = (self._item(parts, i) for i in range(3))
        else:
            q, k, v = (self.b.linear(x, n * size) for n in (heads, groups, groups))
        q, k, v = (self._heads(t, n, size) for t, n in zip((q, k, v), (heads, groups, groups), strict=True))
        gqa = self.choose((True, False))
        if not gqa:
            k, v = (self._repeated(t, heads // groups) for t in (k, v))
        kwargs = {"enable_gqa": True} if gqa else {}
        out = self.call(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, True, **kwargs)
        flat = self.contiguous(self.call(aten.transpose.int, out, 1, 2))
        self.push(self.call(aten.view.default, flat, [2, 3, heads * size]))

    def _heads(self, x: Node, heads: int, size: int) -> Node:
        split = self.call(aten.reshape.default, x, [2, 3, heads, size])
        return self.call(aten.transpose.int, split, 1, 2)

    def _repeated(self, x: Node, times: int) -> Node:
        b, h, s, d = shape(x)
        wide = self.call(aten.expand.default, self.call(aten.unsqueeze.default, x, 2), [b, h, times, s, d])
        return self.call(aten.reshape.default, wide, [b, h * times, s, d])

    def fused_heads(self) -> None:
        """Bloom's and Falcon's layout: one view of [heads, lanes, size], a lane taken by its number."""
        x = self.pick(lambda n: shape(n)[:-1] == [2, 3])
        if x is None:
            return
        heads, lanes, size = self.choose(((2, 3, 4), (1, 4, 3), (2, 3, 2)))
        fused = self.call(aten.view.default, self.b.linear(x, heads * lanes * size), [2, 3, heads, lanes, size])
        taken = []
        for i in range(lanes):
            how = self.choose(("select", "slice", "index"))
            if how == "select":
                taken.append(self.call(aten.select.int, fused, 3, i))
            elif how == "slice":
                taken.append(self.call(aten.slice.Tensor, fused, 3, i, i + 1))
            else:
                index = self.b.buffer(torch.tensor([i - lanes]))
                taken.append(self.call(aten.index.Tensor, fused, [None, None, None, index]))
        if self.choose((True, False, False)):
            taken.append(self.call(aten.slice.Tensor, fused, 3, 0, 2))
        q, k, v = (self.call(aten.reshape.default, self.contiguous(t), [2, 3, heads, size]) for t in taken[:3])
        if self.choose((True, False)):
            q = self.call(aten.tanh.default, q)
        q, k, v = (self.call(aten.transpose.int, t, 1, 2) for t in (q, k, v))
        out = self.call(aten.scaled_dot_product_attention.default, q, k, v)
        flat = self.contiguous(self.call(aten.transpose.int, out, 1, 2))
        self.push(self.call(aten.view.default, flat, [2, 3, heads * size]))
        for node in taken[3:]:
            self.push(node)

    def _broadcasts(self, x: Node, y: Node) -> bool:
        try:
            torch.broadcast_shapes(shape(x), shape(y))
        except RuntimeError:
            return False
        return True

    def finish(self) -> Built:
        """Read by a linear of its own all that nothing else has read."""
        left = [n for n in self.pool if n not in self.read and n.meta["val"].ndim >= 2][-4:] or self.pool[-1:]
        return self.b.finish(*(self.b.linear(n, 3, bias=False) if n.meta["val"].ndim >= 1 else n for n in left))


STEPS: tuple[Callable[[Grower], None], ...] = tuple(
    step
    for name, step in vars(Grower).items()
    if callable(step)
    and not name.startswith("_")
    and name not in ("choose", "number", "pick", "axis", "call", "push", "contiguous", "finish")
)


def grow(data: st.DataObject, *, most: int) -> Built:
    """Return a random graph of an embedding and up to `most` steps."""
    grower = Grower(data)
    grower.embed()
    names = {step.__name__: step for step in STEPS}
    for _ in range(data.draw(st.integers(1, most), label="steps")):
        names[grower.choose(names)](grower)
    return grower.finish()

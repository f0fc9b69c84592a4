"""What GPU kernels read in place of stored tensors, put into a graph when it is compiled, and kept true to them.

Scales and factors are stored as bits of float16 with a power of two; kernels read float32. The graph gets the decoded
tensors as buffers, so that a step neither decodes anything nor asks the device, and a CUDA graph can be recorded: what
were derived during a recording would live in the graph's own memory. After an edit of what is stored the buffer is
written anew, in place: recorded graphs read the same memory.

Where a graph calls modules (those of a raw model's quantized copy), their operators stay calls that look up what is
derived, which is done here, before anything is recorded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from bwla_compiler.errors import BwlaError
from bwla_compiler.runtime import on_triton
from bwla_compiler.runtime.checks import values
from bwla_compiler.runtime.halves import DECODED, whole_factor
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, OnlineTransform, PackedLinear, TiedHead
from bwla_compiler.runtime.ops import LIBRARY
from bwla_compiler.runtime.seen import Seen
from bwla_compiler.runtime.triton_layout import exact_in_tf32, float32, in_words, packed_scale, packed_signs

_OPS: Any = getattr(torch.ops, LIBRARY.ns)

Run = Callable[..., Any]
Make = Callable[..., Tensor]


def _floats(stored: Tensor, exponent: Tensor | None = None) -> Tensor:
    return float32(values(stored, exponent))


def _factor(stored: Tensor, exponent: Tensor | None = None) -> Tensor:
    """Return a factor of a transform as a matrix."""
    return float32(whole_factor(values(stored, exponent)))


def _scale(stored: Tensor, exponent: Tensor | None = None) -> Tensor:
    """Return a scale [planes, out, groups] whose memory lies as the kernels read it."""
    packed = packed_scale(values(stored, exponent))
    return packed if packed.shape[1:] == stored.shape[1:] else packed.transpose(1, 2)


def _words(signs: Tensor, exponent: None = None) -> Tensor:
    """Return signs in the kernels' layout; groups are whole bytes, so that the padded columns are the same."""
    return signs if in_words(signs) else packed_signs(signs, 8 * signs.shape[2])


@dataclass(frozen=True)
class _Operand:
    """An operand of an operator by its place, the place of its exponent, and what kernels read for it."""

    place: int
    exponent: int | None
    make: Make
    is_factor: bool = False


_READ: dict[Any, tuple[_Operand, ...]] = {
    _OPS.linear.default: (
        _Operand(1, None, _words), _Operand(2, 9, _scale), _Operand(3, 10, _floats), _Operand(6, 11, _floats),
        _Operand(7, None, _floats),
    ),
    _OPS.transform.default: (
        _Operand(1, 4, _floats), _Operand(2, 5, _factor, is_factor=True), _Operand(3, 6, _factor, is_factor=True)
    ),
    _OPS.int8_linear.default: (_Operand(2, 4, _floats), _Operand(3, None, _floats)),
    _OPS.int4_linear.default: (_Operand(2, 5, _floats), _Operand(3, None, _floats)),
    _OPS.int8_embedding.default: (_Operand(2, 4, _floats),),
    _OPS.int4_embedding.default: (_Operand(2, 6, _floats),),
}  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """A stored tensor: the graph's input at `place`, or one of its module's own."""

    place: int | None
    own: Tensor | None = None

    def now(self, inputs: Sequence[Any]) -> Tensor:
        """Return the tensor of a call."""
        found = self.own if self.place is None else inputs[self.place]
        assert isinstance(found, Tensor)
        return found


@dataclass
class _Kept:
    """A buffer that was made of stored tensors, and the state in which these were."""

    sources: tuple[_Source, ...]
    make: Make
    buffer: Tensor
    seen: tuple[Seen, ...] = ()

    def look(self, inputs: Sequence[Any]) -> None:
        """Remember the tensors of these inputs."""
        self.seen = tuple(Seen(source.now(inputs)) for source in self.sources)

    def is_true(self, inputs: Sequence[Any]) -> bool:
        """Whether the stored tensors are those that were seen, unedited."""
        return all(seen.holds(source.now(inputs)) for source, seen in zip(self.sources, self.seen, strict=True))

    def renew(self, inputs: Sequence[Any]) -> None:
        """Write the buffer anew. Raises BwlaError where its shape is another, or while a CUDA graph is recorded."""
        found = self.make(*(source.now(inputs) for source in self.sources))
        if found.shape != self.buffer.shape or found.device != self.buffer.device:
            raise BwlaError(
                f"a weight of compiled code is {list(found.shape)} on {found.device} by now, and was "
                f"{list(self.buffer.shape)} on {self.buffer.device}: call torch._dynamo.reset() after such an edit"
            )
        self.buffer.copy_(found)
        self.look(inputs)


class Prepared:
    """The buffers of one graph. exact: names of those that hold factors whose entries are exact in tf32."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._forgotten = DECODED.forgotten
        self.exact: set[str] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, kept: _Kept, inputs: Sequence[Any]) -> None:
        """Watch one more buffer. inputs: example inputs of the graph."""
        kept.look(inputs)
        self._kept.append(kept)

    def renew(self, inputs: Sequence[Any]) -> None:
        """Write anew what was made of tensors that are others, or edited, by now."""
        forgotten = DECODED.forgotten
        stale = [kept for kept in self._kept if forgotten != self._forgotten or not kept.is_true(inputs)]
        with torch.no_grad():
            for kept in stale:
                kept.renew(inputs)
        self._forgotten = forgotten

    def watching(self, run: Run) -> Run:
        """Return the compiled graph as a function that looks at its weights first."""
        if not self._kept:
            return run

        def watched(*inputs: Any) -> Any:
            self.renew(inputs)
            return run(*inputs)

        return watched


def prepare(gm: GraphModule, example_inputs: Sequence[Any]) -> Prepared:
    """Have the operators of a graph read what their kernels do, where Triton serves them; return what was put in.

    gm: as it comes from torch.compile, rewritten in place. example_inputs: the tensors that it will be called with.
    """
    for node in gm.graph.nodes:
        if node.op == "call_module":
            _derive(gm.get_submodule(str(node.target)))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    sources = {node: _Source(place) for place, node in enumerate(placeholders)}
    prepared, known = Prepared(), dict[tuple[Any, ...], Node]()
    for call, operand in list(_operands(gm)):
        nodes = [_argument(call, place) for place in (operand.place, operand.exponent) if place is not None]
        found = [_source(gm, sources, node) for node in nodes if isinstance(node, Node)]
        if None in found or not found:
            continue
        with_exponent = [source for source in found if source is not None]
        if not _served(with_exponent[0].now(example_inputs)):
            continue
        key = (operand.make, *nodes)
        if key not in known:
            made = _made(gm, operand, with_exponent, prepared, example_inputs)
            if made is None:
                continue
            known[key] = made
        _put(call, operand, known[key])
    if len(prepared):
        gm.recompile()
    return prepared


def _derive(called: nn.Module) -> None:
    """Derive what the operators of a module will look up."""
    inner = [called.embedding] if isinstance(called, TiedHead) else []
    for module in (*called.modules(), *inner):
        if not isinstance(module, (PackedLinear, EndLinear, EndEmbedding, OnlineTransform, TiedHead)):
            continue
        for name, stored in module._buffers.items():
            exponent = module._buffers.get(f"{name}_exponent")
            if stored is None or not _served(stored):
                continue
            if exponent is not None:
                if name in ("left", "right"):
                    exact_in_tf32(_factor(stored, exponent))
                else:
                    (_scale if stored.dim() == 3 else _floats)(stored, exponent)
            elif name == "bias":
                _floats(stored)
            elif name == "signs":
                _words(stored)


def _operands(gm: GraphModule) -> Iterator[tuple[Node, _Operand]]:
    """Yield (call, operand) for each tensor that kernels read in another form."""
    for node in gm.graph.nodes:
        if node.op == "call_function":
            for operand in _READ.get(node.target, ()):
                if isinstance(_argument(node, operand.place), Node):
                    yield node, operand


def _argument(call: Node, place: int) -> Any:
    return call.args[place] if place < len(call.args) else None


def _source(gm: GraphModule, sources: Mapping[Node, _Source], node: Node) -> _Source | None:
    """Return where a tensor comes from; None for what only running the graph gives."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return _Source(None, getattr(gm.get_submodule(owner), name))
    return sources.get(node)


def _served(stored: Tensor) -> bool:
    return type(stored) in (Tensor, torch.nn.Parameter) and on_triton.serves(stored)


def _made(
    gm: GraphModule, operand: _Operand, sources: Sequence[_Source], prepared: Prepared, inputs: Sequence[Any]
) -> Node | None:
    """Return the node of a new buffer for an operand; None where kernels read the stored tensor itself."""
    stored = sources[0].now(inputs)
    with torch.no_grad():
        buffer = operand.make(*(source.now(inputs) for source in sources))
    if buffer.data_ptr() == stored.data_ptr():
        return None
    name = f"{_PREFIX}{len(prepared)}"
    gm.register_buffer(name, buffer, persistent=False)
    _name_source(gm, name)
    prepared.add(_Kept(tuple(sources), operand.make, buffer), inputs)
    if operand.is_factor and stored.dtype in _HALVES and exact_in_tf32(buffer):
        prepared.exact.add(name)
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    with gm.graph.inserting_before(first):
        return gm.graph.get_attr(name)


_PREFIX = "bwla_kernel_operand_"

_HALVES = (torch.int16, torch.float16, torch.bfloat16)
"""What cannot hold more than 11 significant bits, whatever is written into it later."""


def _name_source(gm: GraphModule, name: str) -> None:
    """Tell AOTAutograd where a buffer comes from: it is a constant of this compilation."""
    from torch._dynamo.source import ConstantSource

    known: Any = getattr(gm, "_param_name_to_source", None)
    if known is not None:
        known[name] = ConstantSource(name)


def _put(call: Node, operand: _Operand, made: Node) -> None:
    """Have a call read the buffer; its exponent is in it."""
    arguments = list(call.args)
    arguments[operand.place] = made
    if operand.exponent is not None and operand.exponent < len(arguments):
        arguments[operand.exponent] = None
    call.args = tuple(arguments)

"""A tiny model quantized and run under torch.compile(backend="bwla"): graphs, breaks, distance from eager."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from bwla_compiler import api
from bwla_compiler.backend.entry import compile_backend
from bwla_compiler.backend.lower import lower
from bwla_compiler.backend.raw import variants_of
from bwla_compiler.errors import BwlaError
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime import ops
from bwla_compiler.runtime.modules import EndLinear, PackedLinear, TiedHead, set_activation_bits
from bwla_compiler.spec import FLOAT_BITS
from bwla_compiler.tokens import vocabulary

Verdict = Literal["exact", "wrong", "broken", "floats", "refused"]
Depth = Literal["door", "whole"]

RECIPE = "bwla-w1a6"
CALIBRATION = {"tuning.steps": 0, "calibration.sequences": 8, "calibration.length": 16}
"""A tiny model's quality is of no interest: enough tokens for every step to have its numbers, and no tuning."""

BATCH = 2
LENGTHS = (11, 7, 13)
"""Tokens of three calls: the first compiles for its own sizes, the second for any length, the third not at all."""

TOLERANCES: dict[Depth, float] = {"door": 1e-5, "whole": 0.02}
"""Norm of the difference over the norm of the logits. Up to the door the same operators run in the same order; there
is room for masks built by other operations. Inductor's kernels sum in another order, so that an activation at the edge
of two codes may round the other way, which moves it by a whole step. Where Dynamo itself computes a number in another
way the same happens at the door: the comparison is then made once more without rounding, and holds to the door's."""


@dataclass(frozen=True)
class Packed:
    """A model quantized in place. share: of the weights in matrix products that are packed, 0 to 1.

    linear_bits, model_bits: true bits per weight, of the block linears and of the whole model.
    """

    share: float
    linear_bits: float
    model_bits: float


@dataclass(frozen=True)
class Compiled:
    """What became of a model in torch.compile.

    status: "exact" where one graph gave the eager logits, "broken" where several did, "wrong" where the logits
    differ, "floats" where float weights would have served, "refused" where nothing compiled. depth: "whole" where the
    first graph went through Inductor, "door" where all went up to it. reason: why it is not exact. n_graphs: of the
    first call. n_lengths: of calls with three lengths, two where nothing is compiled needlessly. breaks: why the graph
    broke. error: largest of the calls, relative, by the norm. cached: whether the calls return a cache, as they do
    unless the model itself fails then. seconds: wall time.
    """

    status: Verdict
    depth: Depth
    reason: str = ""
    n_graphs: int = 0
    n_lengths: int = 0
    breaks: tuple[str, ...] = ()
    error: float | None = None
    cached: bool = True
    seconds: float = 0.0


def pack(model: nn.Module, weights: Sequence[str], *, seed: int = 0) -> Packed:
    """Quantize a model in place and return what that gave.

    weights: names of the parameters that its matrix products read. Raises what `api.quantize` raises.
    """
    sizes = {name: model.get_parameter(name).numel() for name in weights}
    report = api.quantize(model, recipe=RECIPE, settings=CALIBRATION, seed=seed)
    left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    packed = sum(size for name, size in sizes.items() if name not in left)
    return Packed(packed / max(1, sum(sizes.values())), report.bits.linears, report.bits.model)


def compile_packed(model: nn.Module, *, depth: Depth, seed: int = 0) -> Compiled:
    """Return what becomes of a packed model in torch.compile; raises nothing."""
    bits = load_recipe(RECIPE).activations.bits

    def compared(**how: Any) -> dict[str, Any]:
        return _compared(model, lambda: model, depth=depth, seed=seed, options={}, **how)

    def unrounded() -> dict[str, Any]:
        set_activation_bits(model, FLOAT_BITS)
        try:
            return compared(fullgraph=False)
        finally:
            set_activation_bits(model, bits)

    return _tried(compared, unrounded, depth=depth)


def compile_raw(model: nn.Module, *, depth: Depth, seed: int = 0) -> Compiled:
    """Return what becomes of a float model, which the backend quantizes on the way; raises nothing."""
    options = {"recipe": RECIPE, **CALIBRATION, "seed": seed, "cache": False}

    def compared(options: dict[str, Any] = options, **how: Any) -> dict[str, Any]:
        return _compared(model, lambda: _quantized(model), depth=depth, seed=seed, options=options, **how)

    unrounded = partial(compared, options | {"activation_bits": FLOAT_BITS}, fullgraph=False)
    return _tried(compared, unrounded, depth=depth)


def _quantized(model: nn.Module) -> nn.Module | None:
    """Return the copy that the backend computes with, None where it made none."""
    found = variants_of(model)
    return found[-1].quantized if found else None


def _tried(
    compared: Callable[..., dict[str, Any]], unrounded: Callable[[], dict[str, Any]], *, depth: Depth
) -> Compiled:
    """Return what comparing gives; where the logits differ by no more than a code or two, without rounding too."""
    start = time.perf_counter()
    try:
        try:
            found = compared(fullgraph=True)
        except Unsupported:
            found = compared(fullgraph=False)
        if found["status"] == "wrong" and found["error"] <= TOLERANCES["whole"]:
            found |= _judged_unrounded(found["error"], unrounded()["error"], breaks=found["breaks"])
    except Exception as error:  # whatever a model's code, torch and the backend raise becomes its row
        found = {"status": "refused", "reason": said(error)}
    return Compiled(depth=depth, seconds=time.perf_counter() - start, **found)


def _judged_unrounded(rounded: float, error: float, *, breaks: Sequence[str]) -> dict[str, Any]:
    """Return the verdict on logits that differ, of whose model the same without rounding differ by `error`."""
    if not error <= TOLERANCES["door"]:
        return {}
    why = f"{rounded:.0e} apart as some activation rounds the other way; {error:.0e} without rounding"
    return {"status": "broken", "reason": breaks[0]} if breaks else {"status": "exact", "reason": why}


def _compared(
    model: nn.Module,
    reference: Callable[[], nn.Module | None],
    *,
    depth: Depth,
    seed: int,
    options: dict[str, Any],
    fullgraph: bool,
) -> dict[str, Any]:
    """Return the fields of a `Compiled` after calls of three lengths."""
    graphs: list[bool] = []
    errors, n_graphs, call = [], 0, call_of(model, seed)
    with _fresh_dynamo(), torch.no_grad():
        fast = torch.compile(model, backend=_counting(graphs, depth), fullgraph=fullgraph, options=options)
        for ids in inputs(model, seed):
            found, eager = logits(fast, ids, call), reference()
            n_graphs = n_graphs or len(graphs)
            if eager is None:
                return {"status": "floats", "reason": "nothing was quantized"}
            errors.append(distance(found, logits(eager, ids, call)))
        breaks = tuple(" ".join(text.split())[:200] for text in counters["graph_break"])
    verdict = _verdict(max(errors), depth, breaks, any(graphs))
    counts = {"n_graphs": n_graphs, "n_lengths": len(graphs), "breaks": breaks, "cached": not call}
    return {**verdict, **counts, "error": max(errors)}


def _verdict(error: float, depth: Depth, breaks: Sequence[str], packed: bool) -> dict[str, Any]:
    if not error <= TOLERANCES[depth]:  # NaN is not
        return {"status": "wrong", "reason": f"relative error {error:.1e} of the compiled logits"}
    if not packed:
        return {"status": "floats", "reason": "no packed linear is in its graphs"}
    return {"status": "broken", "reason": breaks[0]} if breaks else {"status": "exact"}


@contextmanager
def _fresh_dynamo() -> Iterator[None]:
    """Have Dynamo know of no earlier model, here and afterwards, and Inductor compile in this process."""
    from torch._inductor import config

    torch._dynamo.reset()
    counters.clear()
    with config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def _counting(graphs: list[bool], depth: Depth) -> Callable[..., Callable[..., Any]]:
    """Return the backend, which notes of each graph whether it calls packed linears.

    The whole way is for the first graph alone: a compilation takes most of a minute.
    """

    def hand_over(gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None) -> Callable[..., Any]:
        graphs.append(_calls_packed(gm))
        through = depth == "whole" and len(graphs) == 1
        return lower(gm, example_inputs, mode=mode) if through else gm.forward

    def bwla(gm: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        return compile_backend(gm, example_inputs, hand_over=hand_over, **options)

    return bwla


def _calls_packed(gm: GraphModule) -> bool:
    """Whether a packed linear is in the graph, as an operator or, in a raw model's, as a module."""
    nodes = gm.graph.nodes
    modules = (gm.get_submodule(node.target) for node in nodes if node.op == "call_module")
    return any(str(node.target).startswith(f"{ops.LIBRARY.ns}.") for node in nodes) or any(
        isinstance(module, (PackedLinear, EndLinear, TiedHead)) for module in modules
    )


def inputs(model: nn.Module, seed: int) -> Iterator[Tensor]:
    """Give random token ids [BATCH, length] int64, for each of LENGTHS."""
    generator = torch.Generator().manual_seed(seed)
    for length in LENGTHS:
        yield torch.randint(0, vocabulary(model), (BATCH, length), generator=generator)


def call_of(model: nn.Module, seed: int) -> dict[str, Any]:
    """Return how the model is called besides its ids: in the plain way, without a cache where that way fails."""
    plain: dict[str, Any] = {}
    try:
        with torch.no_grad():
            logits(model, next(inputs(model, seed)), plain)
    except Exception:  # caches of other kinds than attention's fail in their own ways
        return {"use_cache": False}
    return plain


def logits(model: Any, ids: Tensor, call: dict[str, Any]) -> Tensor:
    """Return a model's logits [n, length, vocabulary] for ids [n, length] int64. call: as `call_of` gave it."""
    out = model(input_ids=ids, **call)
    logits = out if isinstance(out, Tensor) else out.logits
    assert isinstance(logits, Tensor)
    return logits


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the norm of a difference over the norm of what was expected, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def said(error: BaseException) -> str:
    """Return an error in one line, that which the backend raised where torch wraps it."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, Exception):
        return said(inner)
    text = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, BwlaError) else f"{type(error).__name__}: "
    return (kind + text)[:400]

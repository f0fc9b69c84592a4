"""What a linear is held against, by name: torch in eager mode, Inductor, torchao and ggml, each on cold copies.

Inductor gets what it needs to be at its best: `max-autotune` and frozen weights, which it packs as it likes (its
templates and oneDNN's packed products take constants alone). Copies of a frozen weight cannot rotate through one
compiled function, so all of them are products of one graph, and a call computes them all: the time of a product then
holds no call from Python, as within a model, where all other contenders are called one by one.
"""

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.contender import model_bytes
from benchmarks.contest import Contender, check_result
from benchmarks.errors import ResultsError
from benchmarks.ggml import ggml
from benchmarks.gguf_model import lacking
from benchmarks.peers import MAX_AUTOTUNE, Way, named
from benchmarks.timing import copies

QUIET = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}


@dataclass(frozen=True)
class Product:
    """y = x weight^T: weight [out, in] and x [tokens, in] float32, y [tokens, out] float64, on so many threads."""

    weight: Tensor
    x: Tensor
    y: Tensor
    threads: int


@dataclass(frozen=True)
class Peer:
    """make: returns the contender of a product, checked; raises RefusedError where it is wrong.

    missing: returns why there is none here, "" where there is.
    """

    make: Callable[[Product], Contender]
    missing: Callable[[], str] = lambda: ""


def eager(product: Product, *, dtype: torch.dtype) -> Contender:
    """Return torch's own product in a dtype."""
    weight, x = product.weight.to(dtype), product.x.to(dtype)
    # of some 10^4 products in bfloat16, each rounded to 8 bits, the sum is rounded once more
    check_result(nn.functional.linear(x, weight), product.y, f"torch {dtype}", tolerance=1e-2)
    weights = [weight, *(weight.clone() for _ in range(copies(weight.nbytes) - 1))]
    return Contender([partial(nn.functional.linear, x, w) for w in weights], weight.nbytes)


class Linears(nn.Module):
    """Linears of one input, computed one after another."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.linears = nn.ModuleList()
        for weight in weights:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.linears.append(linear)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return each one's product."""
        return [linear(x) for linear in self.linears]


def compiled(product: Product, *, way: Way) -> Contender:
    """Return what Inductor makes of a way's linears; compiled here, before anything is timed."""
    weight, x = product.weight.to(way.dtype), product.x.to(way.dtype)
    n = copies(_bytes(weight, way))
    model = Linears([weight.clone() for _ in range(n)])
    if way.quantize is not None:
        way.quantize(model)
    n_bytes = model_bytes(model) // n
    call = torch.compile(model, mode=MAX_AUTOTUNE, dynamic=False, fullgraph=True)
    with torch._inductor.config.patch({"freezing": True, **QUIET}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own use of what torch has deprecated
        found = call(x)
    for y in (found[0], found[-1]):
        check_result(y, product.y, way.name, tolerance=way.tolerance)
    return Contender([partial(call, x)], n_bytes, products=n, version=way.version())


def release() -> None:
    """Let go of compiled peers, whose code holds their frozen weights: those of large linears fill a memory soon."""
    from torch._inductor.codecache import PyCodeCache  # imports Inductor: only where something was compiled

    torch._dynamo.reset()
    PyCodeCache.cache_clear()
    gc.collect()


def _bytes(weight: Tensor, way: Way) -> int:
    """Return the bytes of one linear as a way stores it."""
    one = Linears([weight.clone()])
    if way.quantize is not None:
        way.quantize(one)
    return model_bytes(one)


def by_ggml(product: Product, *, kind: str) -> Contender:
    """Return ggml's product with weights of one of its types."""
    library, (out, width) = ggml(), product.weight.shape
    if library is None or not library.fits(kind, width):
        raise ResultsError(f"rows of {width} are no whole blocks")
    packed = library.packed(product.weight, kind)
    linears = [
        library.linear(kind, packed, shape=(out, width), tokens=len(product.x), threads=product.threads)
        for _ in range(copies(packed.nbytes))
    ]
    for linear in linears:
        linear.x.copy_(product.x)
    # Weights of one bit are far from the weight itself: what is checked is that the product is one of x.
    check_result(linears[0].run(), product.y, f"ggml {kind}", tolerance=0.9)
    about = f"ggml of {library.version} ({library.features()})"
    return Contender([linear.run for linear in linears], packed.nbytes, version=about)


def _ggml_missing(kind: str) -> str:
    return "llama-cpp-python is not installed" if ggml() is None else lacking(kind)


def _compiled(name: str) -> Peer:
    way = named(name)
    return Peer(partial(compiled, way=way), way.missing)


def _ggml(kind: str) -> Peer:
    return Peer(partial(by_ggml, kind=kind), partial(_ggml_missing, kind))


PEERS = {
    "torch bf16": Peer(partial(eager, dtype=torch.bfloat16)),
    "inductor bf16": _compiled("inductor bf16"),
    "ggml Q1_0": _ggml("Q1_0"),
    "ggml Q4_0": _ggml("Q4_0"),
    "ggml BF16": _ggml("BF16"),
    "torch fp32": Peer(partial(eager, dtype=torch.float32)),
    "torchao int8 dynamic": _compiled("torchao int8 dynamic"),
    "torchao int8 weight-only": _compiled("torchao int8 weight-only"),
    "torchao int4 weight-only": _compiled("torchao int4 weight-only"),
}
"""By name, in the order of the tables."""

SHORT = ("torch bf16", "inductor bf16", "ggml Q1_0", "ggml Q4_0")
"""Peers of a short run: those that the project's aims name."""

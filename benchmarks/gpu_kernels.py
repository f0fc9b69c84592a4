"""Kernels on a GPU: each held against float64 on the device, then timed against what one would use instead."""

import functools
import importlib.util
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_sizes import Bench, say
from bwla_compiler.codegen.triton_tiles import device_for
from bwla_compiler.numerics.planes import unpack_signs
from bwla_compiler.runtime import on_triton
from bwla_compiler.runtime.compiled import Linear
from bwla_compiler.runtime.portable import Prologue, rounded

Call = Callable[[], object]

TOLERANCE = 2e-5
"""Of the largest entry: float32 sums of up to 25 600 products of integers and of the low-rank pair."""


def device_name(bench: Bench) -> str:
    """Return the name of what computes."""
    return platform.processor() if bench.dry else str(torch.cuda.get_device_name())


def random_linear(shape: tuple[int, int], rank: int, device: torch.device, *, seed: int, **format: Any) -> Linear:
    """Return a linear of random signs; format: planes, groups (whether scales are of 128 columns), bias."""
    (out, columns), planes = shape, format.get("planes", 1)
    generator = torch.Generator(device).manual_seed(seed)
    new = functools.partial(torch.randint, generator=generator, device=device)
    groups = -(-columns // 128) if format.get("groups") else 1
    pair = None
    if rank:
        scale = torch.rand(rank, generator=generator, device=device) * 1e-4
        into, onto = (new(-127, 128, s, dtype=torch.int8) for s in ((rank, columns), (out, rank)))
        pair = (into, onto, scale)
    signs = new(0, 256, (planes, out, -(-columns // 8)), dtype=torch.uint8)
    scale = torch.rand(planes, out, groups, generator=generator, device=device) + 0.5
    bias = torch.randn(out, generator=generator, device=device) if format.get("bias") else None
    return Linear(signs, scale, pair, bias)


def exact(q: Tensor, token_scale: Tensor | None, linear: Linear) -> Tensor:
    """Return the linear of codes q in float64, on a thousand of its rows."""
    rows = slice(0, 1000)
    signs = unpack_signs(linear.signs[:, rows], q.shape[1]).double()
    scale = linear.scale[:, rows].double()
    if scale.shape[2] > 1:
        scale = scale.repeat_interleave(128, 2)[..., : q.shape[1]]
    y = q.double() @ (signs * scale).sum(0).T
    if linear.low_rank is not None:
        into, onto, rank_scale = linear.low_rank
        y += ((q.double() @ into.double().T) * rank_scale.double()) @ onto[rows].double().T
    y = y if token_scale is None else y * token_scale.double()
    return y if linear.bias is None else y + linear.bias[rows].double()


FORMATS: tuple[dict[str, Any], ...] = ({"planes": 2, "bias": True}, {"groups": True})


def correctness(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the error of every kernel against float64, by shape, format, bits and tokens. Raises where one is wrong."""
    size = bench.size
    first = next(iter(size.shapes.values()))
    cases: list[tuple[tuple[int, int], dict[str, Any], int, int]]
    cases = [(shape, {}, 6, tokens) for shape in size.shapes.values() for tokens in size.tokens]
    cases += [(first, format, 8, tokens) for format in FORMATS for tokens in size.tokens[:2]]
    cases += [(first, {}, bits, tokens) for bits in (4, 16) for tokens in size.tokens[:2]]
    for shape, format, bits, tokens in cases:
        linear = random_linear(shape, size.rank, bench.device, seed=0, **format)
        x = torch.randn(tokens, shape[1], device=bench.device)
        q, token_scale = rounded(x, None, bits)
        (got,) = on_triton.linears(x, [linear], None, bits)
        what = f"{shape} {format} A{bits}, {tokens} tokens"
        yield {"what": what, "error": _error(got[:, :1000], exact(q, token_scale, linear), what)}
    yield from _other_kernels(bench)


def _other_kernels(bench: Bench) -> Iterator[dict[str, Any]]:
    (out, columns), device = bench.size.head, bench.device
    codes = torch.randint(-127, 128, (out, columns), dtype=torch.int8, device=device)
    for tokens in bench.size.tokens[:3]:
        x = torch.randn(tokens, columns, device=device)
        got = on_triton.int8_linear(x, codes, torch.ones(out, device=device), None)[:, :1000]
        yield {"what": f"head, {tokens} tokens", "error": _error(got, x.double() @ codes[:1000].double().T, "head")}
    for n1, n2 in ((4, 12), (6, 10)) if bench.dry else ((64, 80), (96, 128), (128, 200)):
        left, right = (torch.linalg.qr(torch.randn(n, n))[0].half().float().to(device) for n in (n1, n2))
        x = torch.randn(3, n1 * n2, device=device)
        for kind in ("none", "rms_norm", "silu_mul"):
            gate = torch.randn_like(x) if kind == "silu_mul" else None
            steps = Prologue(kind=kind, eps=1e-6, gate=gate, left=left, right=right)
            got = on_triton._unrounded(x, steps, None).values[:, : n1 * n2]
            what = f"{kind}, factors {n1} x {n2}"
            yield {"what": what, "error": _error(got, turned(x, steps), what)}


def turned(x: Tensor, steps: Prologue) -> Tensor:
    """Return the prologue of x with both factors, in float64."""
    assert steps.left is not None
    assert steps.right is not None
    y = x.double()
    if steps.kind == "rms_norm":
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + steps.eps)
    elif steps.gate is not None:
        y = torch.nn.functional.silu(y) * steps.gate.double()
    matrix = y.view(len(x), len(steps.left), -1)
    return (steps.left.double().T @ matrix @ steps.right.double()).reshape(x.shape)


def _error(got: Tensor, want: Tensor, what: str) -> float:
    error = float((got.double() - want).abs().max() / want.abs().max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"{what}: wrong by {error:.1e} of the largest entry, at most {TOLERANCE:.0e} is allowed")
    return error


def kernels(bench: Bench, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """Yield microseconds of each shape, number of tokens and contender, with shares of what the device can do."""
    peaks = device_for([device_name(bench)])
    for name, (out, columns) in bench.size.shapes.items():
        for tokens in bench.size.tokens:
            if bench.late:
                left_out.append(f"kernels: {name}, {tokens} tokens")
                continue
            say(f"kernels: {name}, {tokens} tokens")
            x = torch.randn(tokens, columns, device=bench.device, dtype=torch.bfloat16)
            for way, (calls, n_bytes) in contenders(bench, (out, columns), x, left_out).items():
                try:
                    seconds = timed(calls, bench)
                except RuntimeError as error:
                    if way.startswith("bwla"):
                        raise
                    left_out.append(f"{way}, {name}, {tokens} tokens: {error}"[:300])
                    continue
                row = {"linear": name, "tokens": tokens, "way": way, "us": 1e6 * seconds, "weight_bytes": n_bytes}
                row["share_of_bandwidth"] = n_bytes / seconds / peaks.bytes_per_second
                row["share_of_int8_peak"] = 2.0 * tokens * out * columns / seconds / peaks.int8_ops_per_second
                yield row


def contenders(
    bench: Bench, shape: tuple[int, int], x: Tensor, left_out: list[str]
) -> dict[str, tuple[list[Call], int]]:
    """Return calls, one for each copy of the weight, and the bytes of a copy, by way."""
    out, columns = shape
    found: dict[str, tuple[list[Call], int]] = {}
    n_bytes = out * -(-columns // 8)
    ranks = (0, bench.size.rank) if x.shape[0] == 1 else (bench.size.rank,)
    for way, rank in ((f"bwla A6{f', rank {rank}' if rank else ''}", rank) for rank in ranks):
        linears = [random_linear(shape, rank, bench.device, seed=s) for s in range(_copies(n_bytes, bench))]
        calls: list[Call] = [functools.partial(on_triton.linears, x, [linear], None, 6) for linear in linears]
        found[way] = calls, n_bytes + rank * (out + columns)
    plain = [random_linear(shape, 0, bench.device, seed=s) for s in range(_copies(n_bytes, bench))]
    found["bwla A6, of codes"] = [_of_codes(x, linear) for linear in plain], n_bytes
    floats = [torch.randn(shape, device=bench.device, dtype=x.dtype) for _ in range(_copies(2 * out * columns, bench))]
    found["bf16"] = [functools.partial(torch.nn.functional.linear, x, w) for w in floats], 2 * out * columns
    if x.shape[0] > 16 and not bench.dry:  # torch._int_mm takes no fewer
        codes, whole = x.char(), [w.char().T for w in floats]
        found["int8 _int_mm"] = [functools.partial(torch._int_mm, codes, w) for w in whole], out * columns
    for way, make in (("torchao int4", _torchao), ("gemlite int4", _gemlite)):
        if importlib.util.find_spec(way.split()[0]) and not bench.dry:
            try:
                found[way] = [make(w, x) for w in floats], out * columns // 2
            except Exception as error:  # other projects' versions differ in what they take: told, and left out
                left_out.append(f"{way} {shape}: {type(error).__name__} {error}"[:300])
    return found


def _of_codes(x: Tensor, linear: Linear) -> Call:
    """Return the call of a linear's own kernels, its input rounded before: what memory and matrix units bound."""
    codes = on_triton._rounded(x, Prologue(), None, 6)
    return functools.partial(on_triton._members, x, codes, [linear], [None], 6)


def _torchao(weight: Tensor, x: Tensor) -> Call:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    quantize_(linear, Int4WeightOnlyConfig(group_size=128))
    linear(x)
    return functools.partial(linear, x)


def _gemlite(weight: Tensor, x: Tensor) -> Call:
    from gemlite.helper import A16W4_HQQ_INT  # type: ignore[import-not-found,unused-ignore]

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=torch.float16)
    made = A16W4_HQQ_INT(device=str(weight.device)).from_linear(linear)
    half = x.half()
    made(half)
    return functools.partial(made, half)


def _copies(n_bytes: int, bench: Bench) -> int:
    """Return how many copies of a weight of so many bytes make it cold at every call: beyond 256 MB, 16 at most."""
    return 2 if bench.dry else max(2, min(16, -(-(256 << 20) // n_bytes)))


def timed(calls: Sequence[Call], bench: Bench) -> float:
    """Return the median seconds of a call over rounds through all copies; on a GPU without what launches cost."""
    calls[0]()  # tiles are chosen outside the graph
    run, seconds = _recorded(calls, bench), []
    for _ in range(max(3, bench.size.rounds)):
        if bench.dry:
            start = time.perf_counter()
            run()
            seconds.append((time.perf_counter() - start) / len(calls))
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        seconds.append(events[0].elapsed_time(events[1]) / 1e3 / len(calls))
    return sorted(seconds)[len(seconds) // 2]


def _recorded(calls: Sequence[Call], bench: Bench) -> Call:
    """Return one call that makes all, as a CUDA graph: a kernel of microseconds is shorter than its launch."""

    def every() -> None:
        for call in calls:
            call()

    every()
    if bench.dry:
        return every
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every()
    return graph.replay

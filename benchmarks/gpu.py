"""Kernels and models on a GPU in one script: `python benchmarks/gpu.py -o results`. No network, random weights.

Every kernel is first held against float64 on the device, then timed against what one would use instead, with weights
that rotate beyond the cache; then steps of models, float and packed, CUDA graphs on both sides. `--dry` runs the same
logic on a CPU with tiny sizes, in Triton's interpreter, and measures nothing.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:  # both are read when Triton and the package are imported
    os.environ |= {"TRITON_INTERPRET": "1", "BWLA_KERNELS": "triton"}
if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import gpu_models
from bwla_compiler.codegen.triton_tiles import device_for
from bwla_compiler.numerics.planes import unpack_signs
from bwla_compiler.runtime import on_triton, triton_tuner
from bwla_compiler.runtime.compiled import Linear
from bwla_compiler.runtime.portable import Prologue, prologue, rounded

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured. shapes: [out, in] by name. seconds: after which nothing new is started."""

    shapes: dict[str, tuple[int, int]]
    tokens: tuple[int, ...]
    rank: int
    stacks: tuple[tuple[str, int | None, tuple[int, ...], int], ...]
    context: int
    rounds: int
    seconds: float
    head: tuple[int, int]


FULL = Size(
    shapes={
        "8B gate_up": (24576, 4096), "8B down": (4096, 12288), "32B qkv": (10240, 5120), "32B o": (5120, 8192),
        "32B gate_up": (51200, 5120), "32B down": (5120, 25600),
    },
    tokens=(1, 8, 32, 128, 2048),
    rank=80,
    stacks=(
        ("Qwen3-8B", 4, (1, 8, 32, 128), 2048), ("Qwen3-32B", 4, (1, 8, 32, 128), 2048), ("Qwen3-32B", None, (1, 8), 0),
    ),
    context=512,
    rounds=20,
    seconds=540.0,
    head=(151936, 5120),
)  # fmt: skip
DRY = Size({"tiny": (24, 160)}, (1, 3), 3, (("tiny", None, (2,), 4),), 4, 1, 1e9, (20, 48))

TOLERANCE = 2e-5
"""Of the largest entry: float32 sums of up to 25 600 products of integers and of the low-rank pair."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where and how much; started: by time.monotonic."""

    size: Size
    device: torch.device
    dry: bool
    started: float

    @property
    def late(self) -> bool:
        """Whether the time that the script may take is over."""
        return time.monotonic() - self.started > self.size.seconds


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure what the arguments ask for, write results.json and results.svg, and return what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "-o", "--out", type=Path, default=None, help="folder of the results; nothing is written without"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--only", choices=("kernels", "models"), default=None)
    chosen = parser.parse_args(arguments)
    if not chosen.dry and not torch.cuda.is_available():
        parser.error("no GPU is here: run it on a machine with one, or with --dry")
    device = torch.device("cpu" if chosen.dry else "cuda")
    bench = Bench(DRY if chosen.dry else FULL, device, chosen.dry, time.monotonic())
    found: dict[str, Any] = {"machine": machine(bench), "dry": chosen.dry, "left_out": []}
    if chosen.only != "models":
        found["correctness"] = list(correctness(bench))
    if chosen.only != "kernels":
        found["models"] = list(models(bench, found["left_out"]))
    if chosen.only != "models":
        found["kernels"] = list(kernels(bench, found["left_out"]))
    found["tiles"] = {k: dataclasses.asdict(choice) for k, choice in triton_tuner.choices().items()}
    found["seconds"] = round(time.monotonic() - bench.started, 1)
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "results.json").write_text(json.dumps(found, indent=1))
        plot(found, chosen.out / "results.svg")
    return found


def machine(bench: Bench) -> dict[str, str]:
    """Return device, versions, commit and command."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "torchao", "gemlite")}
    name = platform.processor() if bench.dry else torch.cuda.get_device_name()
    here = {"device": name, "python": platform.python_version(), "commit": git.stdout.strip() or "unknown"}
    return {**here, **versions, "cuda": str(torch.version.cuda), "command": " ".join(sys.argv)}


def _version(name: str) -> str:
    import importlib.metadata as metadata

    return metadata.version(name) if importlib.util.find_spec(name) else "-"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- kernels


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
            wide = dataclasses.replace(
                steps, gate=None if gate is None else gate.double(), left=left.double(), right=right.double()
            )
            got = on_triton._unrounded(x, steps, None).values[:, : n1 * n2]
            want = prologue(x, wide)
            what = f"{kind}, factors {n1} x {n2}"
            yield {"what": what, "error": _error(got, want.double(), what)}


def _error(got: Tensor, want: Tensor, what: str) -> float:
    error = float((got.double() - want).abs().max() / want.abs().max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"{what}: wrong by {error:.1e} of the largest entry, at most {TOLERANCE:.0e} is allowed")
    return error


def kernels(bench: Bench, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """Yield microseconds of each shape, number of tokens and contender, with shares of what the device can do."""
    peaks = device_for([machine(bench)["device"]])
    for name, (out, columns) in bench.size.shapes.items():
        for tokens in bench.size.tokens:
            if bench.late:
                left_out.append(f"kernels: {name}, {tokens} tokens")
                continue
            _say(f"kernels: {name}, {tokens} tokens")
            x = torch.randn(tokens, columns, device=bench.device, dtype=torch.bfloat16)
            for way, (calls, n_bytes) in contenders(bench, (out, columns), x, left_out).items():
                seconds = timed(calls, bench)
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
    floats = [torch.randn(shape, device=bench.device, dtype=x.dtype) for _ in range(_copies(2 * out * columns, bench))]
    found["bf16"] = [functools.partial(torch.nn.functional.linear, x, w) for w in floats], 2 * out * columns
    if x.shape[0] > 16 and not bench.dry:  # torch._int_mm takes no fewer
        codes, whole = x.char(), [w.char().T for w in floats[:2]]
        found["int8 _int_mm"] = [functools.partial(torch._int_mm, codes, w) for w in whole], out * columns
    for way, make in (("torchao int4", _torchao), ("gemlite int4", _gemlite)):
        if importlib.util.find_spec(way.split()[0]) and not bench.dry:
            try:
                found[way] = [make(w, x) for w in floats], out * columns // 2
            except Exception as error:  # other projects' versions differ in what they take: told, and left out
                left_out.append(f"{way} {shape}: {type(error).__name__} {error}"[:300])
    return found


def _torchao(weight: Tensor, x: Tensor) -> Call:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    quantize_(linear, Int4WeightOnlyConfig(group_size=128))
    linear(x)
    return functools.partial(linear, x)


def _gemlite(weight: Tensor, x: Tensor) -> Call:
    from gemlite.helper import A16W4_HQQ_INT

    linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device=weight.device, dtype=torch.float16)
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


# ---------------------------------------------------------------- models


def models(bench: Bench, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """Yield seconds of steps of models, float and packed: decoding by batch, and a prompt."""
    size = bench.size
    for name, layers, batches, prompt in size.stacks:
        config = gpu_models.config_of(name, layers=layers)
        for way, make in (("bf16", gpu_models.float_model), ("bwla", gpu_models.packed_model)):
            title = f"{name}, {layers or 'all'} layers, {way}"
            if bench.late:
                left_out.append(title)
                continue
            _say(title)
            try:
                model = make(config, bench.device)
                about = {"model": name, "layers": config.num_hidden_layers, "way": way}
                yield from _steps(bench, model, about, left_out, (*batches, *((0,) if prompt else ())), prompt)
            except torch.cuda.OutOfMemoryError as error:
                left_out.append(f"{title}: {error}"[:300])
            model = None  # the next one needs its memory
            torch.compiler.reset()
            if not bench.dry:
                torch.cuda.empty_cache()


def _steps(
    bench: Bench, model: Any, about: dict[str, Any], left_out: list[str], batches: Sequence[int], prompt: int
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model; a batch of 0 stands for the prompt."""
    size, way = bench.size, about["way"]
    for batch in batches:
        if bench.late:
            left_out.append(f"{about}, batch {batch}")
        elif batch:
            found = gpu_models.time_decode(
                model, way, batch=batch, context=size.context, rounds=size.rounds, dry=bench.dry
            )
            yield {**about, "step": "decode", "batch": batch, **_rates(found, batch, bench)}
        else:
            found = gpu_models.time_prefill(model, way, tokens=prompt, rounds=max(3, size.rounds // 4), dry=bench.dry)
            yield {**about, "step": "prefill", "batch": 1, **_rates(found, prompt, bench)}
        torch.compiler.reset()


def _rates(steps: gpu_models.Steps, tokens: int, bench: Bench) -> dict[str, float]:
    peak = 0 if bench.dry else torch.cuda.max_memory_allocated()
    own = dataclasses.asdict(steps)
    return {**own, "tokens_per_second": tokens / steps.seconds, "peak_memory_bytes": peak}


# ---------------------------------------------------------------- the plot


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw how many times faster than bf16 steps are, by batch; nothing without matplotlib or models."""
    if not importlib.util.find_spec("matplotlib") or not found.get("models"):
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = {(m["model"], m["layers"], m["step"], m["batch"], m["way"]): m["seconds"] for m in found["models"]}
    figure, axes = pyplot.subplots(figsize=(7, 4))
    labels, ratios = [], []
    for (model, layers, step, batch, way), seconds in rows.items():
        other = rows.get((model, layers, step, batch, "bf16"))
        if way == "bwla" and other:
            labels.append(f"{model}, {layers} layers\n{step}, batch {batch}")
            ratios.append(other / seconds)
    axes.barh(labels, ratios)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"times faster than bf16, {found['machine']['device']}{' (dry run)' if found['dry'] else ''}")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    print(json.dumps(main()["machine"], indent=1))

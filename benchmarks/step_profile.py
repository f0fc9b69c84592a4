"""`bench profile`: where a decode step goes, by region, by kernel, and in calls between them; and as a Chrome trace."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.contender import TorchRunner
from benchmarks.errors import ResultsError
from benchmarks.noise import pinned
from benchmarks.peers import LLAMA, named
from benchmarks.subject import Subject

Progress = Callable[[str, int, int], None]

STEP = "decode step"
OVERHEAD = "between kernels: Python, guards, dispatch"

REGIONS = (
    ("1-bit linears and, over a static cache, attention", ("bwla::routine",)),
    ("1-bit linears, their norms and transforms", ("bwla::fused", "bwla::linear", "bwla::transform")),
    ("norms and functions alone", ("bwla::prologue", "bwla::sin", "bwla::cos")),
    ("1-bit experts", ("bwla::experts",)),
    ("head and embedding", ("bwla::int8", "bwla::int4")),
    ("attention", ("attention", "bwla::attend", "flash")),
    ("float products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn", "mkl::")),
    ("loops of Inductor", ("cpp_fused", "triton_")),
    ("other operators of torch", ("aten::",)),
)
"""A region, and what names of its kernels begin with or hold; the first that fits counts."""


@dataclass(frozen=True)
class Kernel:
    """Kernels of one name and shapes: calls and microseconds of a step, without what they call."""

    name: str
    shapes: str
    region: str
    calls: float
    us: float


@dataclass(frozen=True)
class StepProfile:
    """One way's decode step. us: of a step without the profiler, which itself takes time; profiled_us: with it."""

    way: str
    threads: int
    us: float
    profiled_us: float
    kernels: tuple[Kernel, ...]

    def regions(self) -> list[tuple[str, float]]:
        """Return regions with their microseconds of a profiled step, the dearest first."""
        found: dict[str, float] = {}
        for kernel in self.kernels:
            found[kernel.region] = found.get(kernel.region, 0.0) + kernel.us
        return sorted(found.items(), key=lambda pair: -pair[1])

    def rows(self, model: str) -> list[dict[str, Any]]:
        """Return a row a region, as results."""
        about = {
            "model": model,
            "way": self.way,
            "threads": self.threads,
            "step_us": round(self.us, 1),
            "profiled_us": round(self.profiled_us, 1),
        }
        return [
            {**about, "region": region, "region_us": round(us, 1), "share": round(us / self.profiled_us, 4)}
            for region, us in self.regions()
        ]


def region_of(name: str) -> str:
    """Return the region that a kernel's name belongs to."""
    for region, parts in REGIONS:
        if any(part in name for part in parts):
            return region
    return OVERHEAD


def profile_step(
    subject: Subject,
    *,
    way: str = "bwla",
    prompt: int = 32,
    steps: int = 16,
    threads: int = 1,
    trace: Path | None = None,
    progress: Progress | None = None,
) -> StepProfile:
    """Return where a decode step of one way goes; also written as a Chrome trace.

    Raises ResultsError for an unknown way, or one that cannot run here.
    """
    tell = progress or (lambda label, done, total: None)
    chosen = named(way)
    folder = subject.folder(chosen.source)
    if chosen.compiler == LLAMA:
        raise ResultsError(f"{way} cannot be profiled: torch's profiler does not see its kernels")
    if missing := chosen.missing() or ("" if folder else "the float model was not given"):
        raise ResultsError(f"{way} cannot be profiled: {missing}")
    # Loops that Inductor writes are told apart from the calls between them only where they are compiled to say so.
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}), pinned(threads), torch.no_grad():
        tell("profile: loading and compiling", 0, 3)
        runner = TorchRunner(chosen, str(folder), subject.ids(prompt + steps), prompt=prompt)
        runner.first()
        runner.round()
        tell("profile: steps without the profiler", 1, 3)
        seconds = min(runner.round()["decode"] for _ in range(3))
        tell("profile: steps", 2, 3)
        runner.prefill()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            start = time.perf_counter()
            for i in range(steps):
                with record_function(STEP):
                    runner.step(i)
            profiled = (time.perf_counter() - start) / steps
        tell("profile: steps", 3, 3)
    if trace is not None:
        seen.export_chrome_trace(str(trace))
    kernels = _kernels(seen.key_averages(group_by_input_shape=True), steps)
    return StepProfile(way, threads, seconds * 1e6, profiled * 1e6, kernels)


def _kernels(events: Sequence[Any], steps: int) -> tuple[Kernel, ...]:
    """Return what was seen of a step, the dearest first."""
    found = [
        Kernel(e.key, _shapes(e), region_of(e.key), e.count / steps, e.self_cpu_time_total / steps)
        for e in events
        if e.self_cpu_time_total > 0
    ]
    return tuple(sorted(found, key=lambda kernel: -kernel.us))


def _shapes(event: Any) -> str:
    """Return the shapes of an event's tensors: of lists those of the members, in the form 2x256x32."""
    said = []
    for shape in event.input_shapes or ():
        members = shape if shape and isinstance(shape[0], (list, tuple)) else [shape]
        said += ["x".join(map(str, member)) for member in members if member]
    return " ".join(said)

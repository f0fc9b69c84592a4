"""How much the benchmarks on a GPU measure, and where; a dry run's sizes are tiny."""

import dataclasses
import sys
import time

import torch


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured. shapes: [out, in] by name. seconds: after which nothing new is started; model_seconds:
    no model either, so that kernels, which come after them, have their time."""

    shapes: dict[str, tuple[int, int]]
    tokens: tuple[int, ...]
    rank: int
    stacks: tuple[tuple[str, int | None, tuple[int, ...], int], ...]
    context: int
    rounds: int
    seconds: float
    model_seconds: float
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
    model_seconds=360.0,
    head=(151936, 5120),
)  # fmt: skip
DRY = Size({"tiny": (24, 160)}, (1, 3), 3, (("tiny", None, (2,), 4),), 4, 1, 1e9, 1e9, (20, 48))


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

    @property
    def late_for_models(self) -> bool:
        """Whether the time that models may take is over."""
        return time.monotonic() - self.started > self.size.model_seconds


def say(text: str) -> None:
    """Tell what is measured now."""
    print(text, file=sys.stderr, flush=True)

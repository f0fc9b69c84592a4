"""What all timed kernels share: contenders with their copies, the check before they are timed, and their figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.errors import RefusedError
from benchmarks.timing import Times, interleaved, quartiles

Call = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """Calls on copies of one weight, and the bytes of a copy. products: of a call, each of a copy of its own.

    version: of what computes it, where that is not torch or this package.
    """

    calls: Sequence[Call]
    n_bytes: int
    products: int = 1
    version: str = ""


def check_result(found: Tensor, expected: Tensor, what: str, *, tolerance: float = 1e-4) -> None:
    """Raise RefusedError where a contender's result is wrong: a wrong kernel's time is worth nothing.

    Wrong: relative error (Frobenius norm, float64) over the tolerance, or not a number.
    """
    error = float((found.double() - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise RefusedError(f"{what} is wrong by {error:.1e} (at most {tolerance:.0e}): not timed")


def contest(contenders: Mapping[str, Contender], *, ours: str, macs: int, rounds: int) -> list[dict[str, Any]]:
    """Time contenders in turn and return a row for each: see `figures`. macs: multiply-adds of a product."""
    calls = interleaved({label: c.calls for label, c in contenders.items()}, rounds=rounds)
    times = {label: calls[label].over(c.products) for label, c in contenders.items()}
    return [
        {"way": label, **figures(times[label], times[ours], c.n_bytes, macs)}
        | ({"version": c.version} if c.version else {})
        for label, c in contenders.items()
    ]


def figures(times: Times, ours: Times, n_bytes: int, macs: int) -> dict[str, float]:
    """Return microseconds with quartiles, rates, and how many times longer than ours it takes, round by round."""
    (low, high), ratios = times.quartiles, ours.ratios(times)
    ratio_low, ratio_high = quartiles(ratios)
    return {
        "us": round(times.median * 1e6, 1),
        "us_low": round(low * 1e6, 1),
        "us_high": round(high * 1e6, 1),
        "spread": round(times.spread, 3),
        "gb_per_second": round(n_bytes / times.median / 1e9, 2),
        "gmac_per_second": round(macs / times.median / 1e9, 1),
        "times_ours": round(ours.ratio(times), 2),
        "times_low": round(ratio_low, 2),
        "times_high": round(ratio_high, 2),
    }

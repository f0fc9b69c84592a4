"""The quality table drawn: what perplexity loses against true bits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

FLOOR = 1e-3
"""Least excess of a ratio over 1 that the plot shows."""
MARKS = {
    "as published": ("o", "0.45"),
    "fair": ("s", "tab:blue"),
    "fair, tuned": ("^", "tab:green"),
    "ours": ("D", "tab:red"),
}


def plot(rows: Sequence[dict[str, Any]], path: Path, *, bits: Sequence[int]) -> Path | None:
    """Draw what perplexity loses at each activation width in `bits`; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError:
        return None
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axes, width in zip(figure.subplots(1, len(bits), sharex=True, sharey=True), bits, strict=True):
        for table, (marker, color) in MARKS.items():
            chosen = [r for r in rows if r["table"] == table]
            if not chosen:
                continue
            x, y, error = [r["true_bits"] for r in chosen], *_excess(chosen, width)
            axes.errorbar(x, y, yerr=error, fmt=marker, color=color, capsize=2, label=table, markersize=5)
            for row, place, value in zip(chosen, x, y, strict=True):
                axes.annotate(row["way"], (place, value), (6, 3), textcoords="offset points", fontsize=6, color=color)
        axes.set_yscale("log")  # of the ratio less 1, so that what is near the float model stays apart
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 + value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("true bits a weight")
        axes.set_title(f"A{width}")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("perplexity over the float model's")
    figure.axes[0].legend(loc="upper right")
    figure.savefig(path)
    return path


def _excess(rows: Sequence[dict[str, Any]], bits: int) -> tuple[list[float], list[list[float]]]:
    """Return the ratios less 1, at least FLOOR, and how far their intervals reach below and above."""
    values = [max(FLOOR, row[f"a{bits}"] - 1) for row in rows]
    spans = [[max(FLOOR, float(end) - 1) for end in row[f"a{bits}_95"].split("-")] for row in rows]
    below = [max(0.0, value - span[0]) for value, span in zip(values, spans, strict=True)]
    above = [max(0.0, span[1] - value) for value, span in zip(values, spans, strict=True)]
    return values, [below, above]

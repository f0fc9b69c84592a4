"""Drawings of kernels' results: the roofline, and time against the number of tokens. matplotlib is optional."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_tables import CEILING, timed_linears
from benchmarks.record import Row

COLORS = {
    "bwla A6": "tab:red", "bwla A8": "tab:orange", "bwla A4": "tab:pink", "torch bf16": "tab:blue",
    "torch fp32": "tab:cyan", "inductor bf16": "tab:purple", "torchao int4 weight-only": "black",
    "ggml Q1_0": "tab:green", "ggml Q4_0": "tab:olive", "ggml BF16": "tab:brown",
}  # fmt: skip
SALT = "results"


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure whose files are the same bytes every time, or None where matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    matplotlib.rcParams["svg.hashsalt"] = SALT
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> Path:
    """Write a figure as SVG without the day in it and return its file."""
    figure.savefig(path, metadata={"Date": None})
    return path


def ceiling(rows: Sequence[Row], way: str, threads: int) -> float | None:
    """Return a ceiling's rate as it was measured last on so many threads, in 1e9 bytes or multiply-adds a second."""
    for row in reversed(rows):
        if row["linear"] == CEILING and row["way"] == way and row["threads"] == threads:
            return float(row.get("gb_per_second") or row["gmac_per_second"])
    return None


def draw_roofline(rows: Sequence[Row], path: Path, *, threads: int = 1) -> Path | None:
    """Draw multiply-adds a second against multiply-adds a weight byte, under the ceilings of the same run.

    None where matplotlib is not installed or there are no ceilings.
    """
    read = ceiling(rows, "pure read", threads)
    figure = new_figure(7.5, 5)
    if figure is None or read is None:
        return None
    axes = figure.subplots()
    span = (0.3, 3000.0)
    for way, style in (("int8 multiply-adds", "-"), ("float32 multiply-adds", "--")):
        peak = ceiling(rows, way, threads)
        if peak is not None:
            corner = peak / read
            axes.plot([span[0], corner, span[1]], [span[0] * read, peak, peak], style, color="0.4", linewidth=1)
            axes.annotate(
                f"{way}: {peak:,.0f} G/s", (span[1], peak), (-4, 4), textcoords="offset points", ha="right", fontsize=7
            )
    axes.annotate(
        f"pure read: {read:.1f} GB/s", (span[0], span[0] * read), (6, 2), textcoords="offset points", fontsize=7
    )
    chosen = [r for r in timed_linears(rows) if r["threads"] == threads and r["way"] in COLORS]
    for way, color in COLORS.items():
        mine = [r for r in chosen if r["way"] == way]
        if mine:
            x = [r["gmac_per_second"] / r["gb_per_second"] for r in mine]
            axes.plot(x, [r["gmac_per_second"] for r in mine], "o", color=color, label=way, markersize=4)
    axes.set(xscale="log", yscale="log", xlim=span, xlabel="multiply-adds a byte of weights",
             ylabel="1e9 multiply-adds a second", title=f"Linears, {threads} thread{'s' * (threads > 1)}")  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    return save(figure, path)


def draw_speed(rows: Sequence[Row], path: Path, *, threads: int = 1) -> Path | None:
    """Draw microseconds against tokens, a panel a linear. None without matplotlib, or where nothing is timed."""
    chosen = [r for r in timed_linears(rows) if r["threads"] == threads and r["way"] in COLORS]
    names = list(dict.fromkeys(r["linear"] for r in chosen))
    figure = new_figure(3.4 * max(1, min(4, len(names))), 3.2 * max(1, -(-len(names) // 4)))
    if figure is None or not names:
        return None
    panels = figure.subplots(-(-len(names) // 4), min(4, len(names)), squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        for way, color in COLORS.items():
            mine = sorted(
                (r for r in chosen if r["linear"] == name and r["way"] == way), key=lambda r: int(r["tokens"])
            )
            if mine:
                axes.plot(
                    [r["tokens"] for r in mine], [r["us"] for r in mine], "o-", color=color, label=way, markersize=3
                )
                low, high = ([r.get(end, r["us"]) for r in mine] for end in ("us_low", "us_high"))
                axes.fill_between([r["tokens"] for r in mine], low, high, color=color, alpha=0.15, linewidth=0)
        axes.set(xscale="log", yscale="log", title=name, xlabel="tokens", ylabel="microseconds")
        axes.grid(alpha=0.3, which="both")
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    panels[0].legend(fontsize=6)
    return save(figure, path)

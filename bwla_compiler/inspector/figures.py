"""Small pictures for the page: weights before and after, ranges of inputs, and what was said of one linear."""

import math
from collections.abc import Sequence
from html import escape

from bwla_compiler.inspector.report import LETTERS, InspectorReport, LinearRow
from bwla_compiler.inspector.table import number
from bwla_compiler.inspector.why import explain
from bwla_compiler.numerics.spread import REACH, Tails, WeightSpread

WIDTH, HEIGHT = 240, 74
"""Of a picture, in units of its viewBox."""

RANGE = 300.0
"""Largest max |x| over rms that a picture of channels shows, on a logarithmic scale from 1."""


def spread_figures(linear: LinearRow) -> str:
    """Return the pictures of one linear's weight and input, "" where nothing was gathered."""
    spread = linear.spread
    if spread is None:
        return ""
    weights = _weights(spread.weight_before, spread.weight_after)
    return weights + _inputs(spread.input_before, spread.input_after)


def _weights(before: WeightSpread | None, after: WeightSpread | None) -> str:
    known = [x for x in (before, after) if x is not None]
    if not known:
        return ""
    top = max(max(x.counts) / max(1, sum(x.counts)) for x in known)
    paths = "".join(
        f'<path class="{kind}" d="{_steps([n / max(1, sum(x.counts)) / top for n in x.counts])}"/>'
        for kind, x in (("before", before), ("after", after))
        if x is not None
    )
    marks = "".join(_mark(WIDTH * (0.5 + at / (2 * REACH)), text) for at, text in ((-1, "-1"), (0, "0"), (1, "1")))
    values = " → ".join(f"{x.bimodality:.3f}" for x in known)
    return _figure("Weights, in units of their row's mean", paths + marks, f"bimodality {values}")


def _inputs(before: Tails | None, after: Tails | None) -> str:
    known = [x for x in (before, after) if x is not None]
    if not known:
        return ""
    paths = "".join(
        f'<path class="{kind}" d="{_steps([_log(v) for v in x.channels])}"/>'
        for kind, x in (("before", before), ("after", after))
        if x is not None
    )
    marks = "".join(
        f'<line class="grid" x1="0" x2="{WIDTH}" y1="{_y(_log(v))}" y2="{_y(_log(v))}"/>'
        f'<text class="tick" x="{WIDTH}" y="{_y(_log(v)) - 2}" text-anchor="end">{v}</text>'
        for v in (10, 100)
    )
    peaks = " → ".join(f"{x.peak:.3g}" for x in known)
    lost = " → ".join(f"{x.lost:.1%}" for x in known)
    zeroed = " → ".join(f"{x.zeroed:.0%}" for x in known)
    text = f"peak / rms {peaks}; {known[-1].bits} bits lose {lost}, zero {zeroed}"
    return _figure("Input, largest value of each channel over rms", marks + paths, text)


def _figure(title: str, drawing: str, caption: str) -> str:
    return (
        f'<figure class="spread"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT + 14}" '
        f'role="img" aria-label="{escape(title)}: {escape(caption)}">{drawing}</svg><p>{escape(caption)}</p></figure>'
    )


def _mark(x: float, text: str) -> str:
    return f'<text class="tick" x="{x:.0f}" y="{HEIGHT + 12}" text-anchor="middle">{text}</text>'


def _log(value: float) -> float:
    return min(1.0, max(0.0, math.log(max(value, 1.0)) / math.log(RANGE)))


def _y(share: float) -> int:
    return round(HEIGHT - share * (HEIGHT - 4))


def _steps(shares: Sequence[float]) -> str:
    """Return a staircase over the width from shares in [0, 1] of the height."""
    parts = [f"M0 {HEIGHT}"]
    for i, share in enumerate(shares):
        parts.append(f"V{_y(share)}H{round(WIDTH * (i + 1) / len(shares))}")
    return "".join([*parts, f"V{HEIGHT}"])


def linear_card(report: InspectorReport, linear: LinearRow) -> str:
    """Return all that is known of one linear: decision, figures, pictures and reasons in sentences."""
    facts = [("shape", linear.sizes), ("input", linear.input.replace(linear.block + ".", "") or "-")]
    if linear.format and linear.format.transform:
        facts.append(("at run time", linear.format.transform))
    facts += [(what, number(value)) for what, value in (("bits", linear.bits), ("error", linear.error)) if value]
    listed = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(text)}</dd></div>" for what, text in facts)
    pictures = spread_figures(linear)
    words = "".join(f"<p>{escape(part)}</p>" for part in explain(report, linear.name).split("\n\n"))
    name = escape(linear.name).replace(".", ".<wbr>")
    return (
        f'<h3><span class="swatch {linear.decision}">{LETTERS[linear.decision]}</span><span>{name}</span></h3>'
        f"<dl>{listed}</dl>{f'<div class=pictures>{pictures}</div>' if pictures else ''}"
        f'<div class="words">{words}</div>'
    )

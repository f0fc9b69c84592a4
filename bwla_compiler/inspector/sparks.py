"""Tables with pictures of one line for the terminal: spreads of weights and inputs, and where a step's time goes."""

import itertools
from collections.abc import Iterable, Sequence

from bwla_compiler.inspector.bars import WORDS, seconds_text
from bwla_compiler.inspector.cost import MODELLED, CostReport
from bwla_compiler.inspector.report import InspectorReport, LinearRow
from bwla_compiler.inspector.table import Cell, Table, row, size

LEVELS = "▁▂▃▄▅▆▇█"
"""Heights of a sparkline's characters."""

NARROW = 10
"""Characters of a sparkline or of a full bar."""


def sparkline(values: Sequence[float], *, width: int = NARROW) -> str:
    """Return values as one line of blocks, neighbours added up to `width` characters; "" for none."""
    if not values:
        return ""
    width = min(width, len(values))
    ends = [len(values) * i // width for i in range(width + 1)]
    sums = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    top = max(sums) or 1.0
    return "".join(LEVELS[min(len(LEVELS) - 1, round(value / top * (len(LEVELS) - 1)))] for value in sums)


def bar(share: float, *, width: int = NARROW) -> str:
    """Return a bar of at most `width` characters, to an eighth of one."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def spread_table(report: InspectorReport) -> Table:
    """Return how weights and inputs are spread before and after: figures are means over alike blocks."""
    rows = []
    for block in report.blocks:
        members = [x for x in report.linears if x.block in block.names]
        for first in block.linears:
            same = [x for x in members if x.short == first.short]
            if any(x.spread for x in same):
                rows.append(_spread_row(first, same))
    columns = ("linear", "weights", "after", ">bimodality", ">peak", ">lost")
    note = (
        "Before, and after (→). Weights: histogram. Bimodality: 1/3 is normal, 1 is two values. Peak: a token's "
        "largest value over its rms. Lost: share of an input's energy that rounding loses."
    )
    return Table("Weights and inputs", columns, tuple(rows), note)


def _spread_row(first: LinearRow, same: Sequence[LinearRow]) -> tuple[Cell, ...]:
    spreads = [x.spread for x in same if x.spread]
    weights = [
        [s.weight_before for s in spreads if s.weight_before],
        [s.weight_after for s in spreads if s.weight_after],
    ]
    inputs = [[s.input_before for s in spreads if s.input_before], [s.input_after for s in spreads if s.input_after]]
    sparks = [sparkline(found[0].counts) if found else "" for found in weights]
    return row(
        first.short,
        Cell(sparks[0], "quiet"),
        Cell(sparks[1], first.decision),
        _arrow([_mean(w.bimodality for w in found) for found in weights], "{:.2f}"),
        _arrow([_mean(t.peak for t in found) for found in inputs], "{:.3g}"),
        _arrow([_mean(t.lost for t in found) for found in inputs], "{:.1%}"),
    )


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def _arrow(values: Sequence[float | None], form: str) -> str:
    return " → ".join(form.format(v) for v in values if v is not None) or "-"


def parts_table(cost: CostReport) -> Table:
    """Return where a decoded token and a prompt spend their time on the chosen device."""
    device = cost.device()
    total = sum(p.seconds for p in device.decode) or 1.0
    prefill = {p.name: p for p in device.prefill}
    rows = [
        row(
            WORDS[p.name],
            size(p.n_bytes),
            seconds_text(p.seconds),
            f"{p.seconds / total:.0%}",
            Cell(bar(p.seconds / total), "online"),
            seconds_text(prefill[p.name].seconds) if p.name in prefill else "-",
        )
        for p in device.decode
    ]
    whole = sum(p.seconds for p in device.prefill)
    moved = size(sum(p.n_bytes for p in device.decode))
    rows.append(row("whole", moved, seconds_text(total), "", "", seconds_text(whole)))
    columns = ("part", ">bytes", ">a token", ">share", "", ">prompt")
    plain = seconds_text(sum(p.seconds for p in device.float_decode))
    note = f"{MODELLED} Context and prompt: {cost.context:,} tokens. In 16 bit a token takes {plain}."
    return Table(f"A step on {device.device}: modelled", columns, tuple(rows), note)

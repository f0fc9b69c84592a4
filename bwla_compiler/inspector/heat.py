"""The heat map: layers against linears, coloured by one of several measures, switched without a script."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from bwla_compiler.inspector.report import LETTERS, InspectorReport, LinearRow

WIDE = 14
"""Number of blocks up to which cells show their numbers."""

EVERY = 8
"""Columns of a wider map from number to number."""


@dataclass(frozen=True)
class Measure:
    """One way to colour the map. key: of attributes; lead: what it shows; inverse: where less is worse."""

    key: str
    name: str
    lead: str
    value: Callable[[LinearRow], float | None]
    inverse: bool = False


def _tail(x: LinearRow, when: str) -> float | None:
    found = None if x.spread is None else x.spread.input_before if when == "before" else x.spread.input_after
    return None if found is None else found.peak


def _bimodality(x: LinearRow) -> float | None:
    found = None if x.spread is None else x.spread.weight_after or x.spread.weight_before
    return None if found is None else found.bimodality


MEASURES = (
    Measure("e", "error", "Share of the output's energy that is lost; darker is worse.", lambda x: x.error),
    Measure("b", "bits", "Bits a weight, transforms and pairs counted; darker is more.", lambda x: x.bits),
    Measure(
        "t", "tails before", "Largest value of a token over its rms, as the model came.", lambda x: _tail(x, "before")
    ),
    Measure("u", "tails after", "The same as it is rounded now, on the same scale.", lambda x: _tail(x, "after")),
    Measure(
        "m", "bimodality", "Of the fitted weights: 1/3 is normal, 1 is two values; darker is less.", _bimodality, True
    ),
)
"""What the map can show beside the decisions."""


def heat_map(report: InspectorReport) -> str:
    """Return the map with the switch above it; a cell leads to its linear's row."""
    shown = [m for m in MEASURES if any(m.value(x) is not None for x in report.linears if x.block)]
    default = "e" if report.measured else "d"
    options = [("d", "decision", "What was decided for each linear's input.")] + [
        (m.key, m.name, m.lead) for m in shown
    ]
    switch = "".join(
        f'<label title="{escape(lead)}"><input type="radio" name="measure" value="{key}"'
        f"{' checked' if key == default else ''}><span>{escape(name)}</span></label>"
        for key, name, lead in options
    )
    leads = "".join(f'<p class="lead m-{key}">{escape(lead)}</p>' for key, _, lead in options)
    return f'<fieldset class="switch"><legend>Colour by</legend>{switch}</fieldset>{leads}{_table(report, shown)}'


def _table(report: InspectorReport, shown: list[Measure]) -> str:
    blocks = list(dict.fromkeys(x.block for x in report.linears if x.block))
    shorts = list(dict.fromkeys(x.short for x in report.linears if x.block))
    cells = {(x.short, x.block): x for x in report.linears}
    scales = _scales(report, shown)
    wide = len(blocks) <= WIDE
    head = "".join(
        f'<th scope="col" title="{escape(n)}">{escape(_index(n)) if wide or i % EVERY == 0 else ""}</th>'
        for i, n in enumerate(blocks)
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(short)}</th>'
        + "".join(_cell(cells.get((short, n)), shown, scales, wide) for n in blocks)
        + "</tr>"
        for short in shorts
    )
    return (
        f'<div class="scroll"><table class="map{"" if wide else " dense"}"><thead><tr><th scope="col">layer</th>{head}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _scales(report: InspectorReport, shown: list[Measure]) -> dict[str, tuple[float, float]]:
    """Return the least and the largest value of each measure; tails before and after share theirs."""
    found = {}
    for measure in shown:
        values = [v for x in report.linears if x.block and (v := measure.value(x)) is not None]
        found[measure.key] = (0.0 if measure.key == "e" else min(values), max(values))
    if "t" in found and "u" in found:
        both = (min(found["t"][0], found["u"][0]), max(found["t"][1], found["u"][1]))
        found |= {"t": both, "u": both}
    return found


def _cell(x: LinearRow | None, shown: list[Measure], scales: dict[str, tuple[float, float]], wide: bool) -> str:
    if x is None:
        return "<td></td>"
    levels, texts, said = [], [], [x.decision]
    for measure in shown:
        value = measure.value(x)
        if value is None:
            continue
        low, high = scales[measure.key]
        share = (value - low) / (high - low) if high > low else 0.0
        levels.append(f"--{measure.key}:{4 + 66 * (1 - share if measure.inverse else share):.0f}%")
        said.append(f"{measure.name} {value:.3g}")
        if wide:
            texts.append(f' data-{measure.key}="{value:.2g}"')
    label = f"{x.name}: {', '.join(said)}"
    return (
        f'<td class="{x.decision}" style="{";".join(levels)}"><a href="#linear-{escape(x.name)}" tabindex="-1" '
        f'data-linear="{escape(x.name)}" data-d="{LETTERS[x.decision]}"{"".join(texts)} title="{escape(label)}" '
        f'aria-label="{escape(label)}"></a></td>'
    )


def _index(block: str) -> str:
    return next((part for part in reversed(block.split(".")) if part.isdigit()), block)

"""The costs of a step as stacked bars: a decoded token and a prompt, packed and in 16 bit, by device."""

from collections.abc import Sequence
from html import escape

from bwla_compiler.cost.parts import PARTS, PartCost
from bwla_compiler.inspector.cost import CostReport, DeviceCost, region_table
from bwla_compiler.inspector.page import table_html
from bwla_compiler.inspector.table import Table, size

WORDS = {
    "weights": "packed weights",
    "transforms": "transforms and rounding",
    "low rank": "low-rank pairs",
    "kept": "weights in floats",
    "embedding": "embedding",
    "head": "head",
    "attention": "attention and KV cache",
    "rest": "norms and the rest",
}
"""What the legend calls the parts."""


def cost_bars(cost: CostReport) -> str:
    """Return one panel a device, with a choice of them; without a script the chosen device is shown."""
    options = "".join(
        f'<option value="{d.device}"{" selected" if d.device == cost.chosen else ""}>{d.device}</option>'
        for d in cost.devices
    )
    panels = "".join(_panel(cost, d) for d in cost.devices)
    return f'<label class="choice">Device <select id="choose-device">{options}</select></label>{panels}'


def _panel(cost: CostReport, device: DeviceCost) -> str:
    hidden = "" if device.device == cost.chosen else " hidden"
    prompt = f"{cost.context:,} tokens"
    table = region_table(cost, device.device)
    return (
        f'<div class="panel" data-device="{device.device}"{hidden}>'
        + _chart("One decoded token", f"one sequence, {prompt} of context", device.decode, device.float_decode)
        + _chart("A prompt", f"prefill of {prompt}", device.prefill, device.float_prefill)
        + _legend(device)
        + table_html(Table("", table.columns, table.rows, table.note))
        + "</div>"
    )


def _chart(title: str, lead: str, packed: Sequence[PartCost], plain: Sequence[PartCost]) -> str:
    totals = [sum(p.seconds for p in parts) for parts in (packed, plain)]
    longest = max(*totals, 1e-30)
    rows = "".join(
        f"<span>{name}</span>{_bar(parts, longest)}<span><b>{seconds_text(total)}</b> {_moved(parts)}</span>"
        for name, parts, total in (("packed", packed, totals[0]), ("16 bit", plain, totals[1]))
    )
    return f'<h3>{title} <small>{escape(lead)}; {_gain(*totals)}, modelled</small></h3><div class="stacks">{rows}</div>'


def _gain(packed: float, plain: float) -> str:
    """Return how much faster, or slower, packed weights are."""
    if not packed or not plain:
        return "nothing to compare"
    return f"{plain / packed:.1f} times faster" if plain >= packed else f"{packed / plain:.1f} times slower"


def _bar(parts: Sequence[PartCost], longest: float) -> str:
    pieces = "".join(
        f'<i class="part p{PARTS.index(p.name)}" style="width:{100 * p.seconds / longest:.2f}%" '
        f'title="{WORDS[p.name]}: {seconds_text(p.seconds)}, {size(p.n_bytes)}"></i>'
        for p in parts
        if p.seconds / longest > 5e-4
    )
    return f'<span class="stack">{pieces}</span>'


def _moved(parts: Sequence[PartCost]) -> str:
    return f"{size(sum(p.n_bytes for p in parts))}, {operations(sum(p.ops for p in parts))}"


def _legend(device: DeviceCost) -> str:
    total = sum(p.seconds for p in device.decode) or 1.0
    shares = {p.name: p.seconds / total for p in device.decode}
    names = {p.name for parts in (device.decode, device.float_decode) for p in parts}
    items = "".join(
        f'<li><span class="swatch part p{i}"></span>{WORDS[name]}{_share(shares.get(name, 0.0))}</li>'
        for i, name in enumerate(PARTS)
        if name in names
    )
    return f'<ul class="keys" aria-label="Shares of a decoded token">{items}</ul>'


def _share(share: float) -> str:
    return f" <b>{share:.0%}</b>" if share >= 0.005 else ""


def seconds_text(seconds: float) -> str:
    """Return a time with one fitting unit, three digits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def operations(count: float) -> str:
    """Return a number of operations with a decimal prefix."""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}FLOP"
    return f"{count:.0f} FLOP"

"""The page's sections on one model: dataflow, one linear, heat map, spreads, costs, tables."""

import json
from html import escape

from bwla_compiler.inspector.bars import cost_bars, seconds_text
from bwla_compiler.inspector.collapse import spans
from bwla_compiler.inspector.cost import crossover_table, device_table
from bwla_compiler.inspector.diagram import Palette, block_svg, palette
from bwla_compiler.inspector.figures import linear_card
from bwla_compiler.inspector.heat import heat_map
from bwla_compiler.inspector.page import Section, render_page, table_html
from bwla_compiler.inspector.report import LETTERS, MEANINGS, BlockRow, InspectorReport, LinearRow
from bwla_compiler.inspector.table import Cell, Table, number, row, size
from bwla_compiler.inspector.terminal import basis_table, norm_table, pass_table, unknown_table

LINKS = {"unknown": "Without a rule", "decoding": "Devices", "crossover": "Crossover", "skipped": "Left alone"}
"""What the links to sections with long titles are called."""

LONG = 40
"""Rows from which a table is folded away until it is asked for."""


def report_page(report: InspectorReport) -> str:
    """Return the page on one model."""
    recipe = f", recipe {report.recipe}" if report.recipe else ""
    repeated = f". {report.repeated}." if report.repeated else ""
    title, subtitle = report.source or report.model, f"{report.model}{recipe}{repeated}"
    return render_page(title, report_sections(report), subtitle=subtitle, facts=report_facts(report))


def report_facts(report: InspectorReport) -> tuple[tuple[str, str], ...]:
    """Return the numbers for the head of the page."""
    facts = [(str(n), f"linears {decision}") for decision, n in report.counts.items() if n]
    facts.append((str(sum(b.freedom != "pinned" for b in report.bases)), "free bases"))
    if report.bits:
        facts += [
            (f"{report.bits.linears:.2f}", "true bits per linear weight"),
            (f"{report.bits.model:.2f}", "true bits per weight of the model"),
            (size(report.bits.n_bytes), "model"),
        ]
    elif report.cost:
        facts.append((size(report.cost.n_bytes), f"packed, of {size(report.cost.float_bytes)} in 16 bit"))
    if report.cost:
        device = report.cost.device()
        facts.append((seconds_text(device.seconds), f"a token on {device.device}, modelled"))
    return tuple(facts)


def report_sections(report: InspectorReport) -> list[Section]:
    """Return the sections that have something to show."""
    found = [flow_section(report, i, block) for i, block in enumerate(report.blocks) if block.names[0]]
    found.append(detail_section(report))
    if any(block.names[0] for block in report.blocks):
        found.append(Section("map", "Layers and linears", heat_map(report)))
    if report.cost:
        lead = "Where the time of a step goes: a roofline of the device's peaks, modelled and not measured."
        found.append(Section("cost", "Costs", cost_bars(report.cost), lead))
    found.append(linear_section(report))
    tables = [("bases", basis_table(report)), ("norms", norm_table(report)), ("passes", pass_table(report))]
    tables.append(("unknown", unknown_table(report)))
    if report.cost:
        tables += [("decoding", device_table(report.cost)), ("crossover", crossover_table(report.cost))]
    tables.append(("skipped", skipped_table(report)))
    for key, table in tables:
        if table.rows:
            body = _folded(Table("", table.columns, table.rows, table.note))
            found.append(Section(key, table.title, body, link=LINKS.get(key, "")))
    return found


def _folded(table: Table, ids: tuple[str, ...] = ()) -> str:
    """Return a table, folded away where it is long."""
    shown = table_html(table, ids=ids)
    if len(table.rows) < LONG:
        return shown
    return f"<details><summary>{len(table.rows)} rows</summary>{shown}</details>"


def flow_section(report: InspectorReport, index: int, block: BlockRow) -> Section:
    """Return the picture of one block with its legend; the letters are explained beside it."""
    times = f" x {len(block.names)}" if len(block.names) > 1 else ""
    used = dict.fromkeys(linear.decision for linear in block.linears)
    letters = "".join(
        f'<li><span class="swatch {d}">{letter}</span><span>{d}<small>{escape(MEANINGS[d])}</small></span></li>'
        for d, letter in LETTERS.items()
        if d in used
    )
    colours = palette(block, report.chains)
    tools = "".join(
        f'<button type="button" data-zoom="{key}" aria-label="{name}" title="{name}">{text}</button>'
        for key, name, text in (("in", "Zoom in", "+"), ("out", "Zoom out", "-"), ("fit", "Whole picture", "⤢"))
    )
    body = (
        f'<div class="flow-side"><div class="canvas" tabindex="0" role="group" '
        f'aria-label="Picture: plus and minus zoom, arrows move, 0 fits"><div class="tools">{tools}</div>'
        f"{block_svg(block, report.norms, colours)}</div>"
        f'<div><h3>Inputs</h3><ul class="legend">{letters}</ul>'
        f'<h3>Chains <small>choose one to light it up</small></h3><ul class="legend chains">'
        f"{_chain_legend(report, colours)}</ul></div></div>"
    )
    lead = (
        "Lines carry the colour of the basis that their tensor lives in; dashed grey is pinned. A box tells its story."
    )
    return Section(f"block-{index}", f"{block.label}{times}", body, lead, link=block.label.removeprefix(report.prefix))


def _chain_legend(report: InspectorReport, colours: Palette) -> str:
    known = {basis.name: basis for basis in report.bases}
    items = []
    for name in sorted(colours.names, key=lambda n: n != "residual"):
        basis = known.get(name)
        if basis is None:
            continue
        writers, readers = (", ".join(spans(names)) or "none" for names in (basis.writers, basis.readers))
        ends = f"written by {writers}; read by {readers}"
        text = f"{basis.size} channels, {basis.freedom}. {basis.reason}"
        chain = f"c{colours.chains[name]}" if name in colours.chains else ""
        items.append(
            f'<li><button type="button" data-light="{chain}" aria-pressed="false"><span class="swatch '
            f'{colours.of((name,))}"></span><span>{escape(name)}<small>{escape(text)}</small>'
            f'<small class="ends">{escape(ends)}</small></span></button></li>'
        )
    note = "an operation fixes these channels: no rotation folds here"
    items.append(f'<li><span class="swatch pinned"></span><span>pinned<small>{note}</small></span></li>')
    return "".join(items)


def detail_section(report: InspectorReport) -> Section:
    """Return the section that tells one linear's story; a script puts in the one that is chosen.

    The stories of all linears travel as JSON; without a script the first online one is told.
    """
    first = next((x for x in report.linears if x.decision in ("online", "partial")), report.linears[0])
    cards = json.dumps({x.name: linear_card(report, x) for x in report.linears}, separators=(",", ":"))
    options = "".join(_option(report, x, chosen=x is first) for x in report.linears)
    body = (
        f'<label class="choice">Linear <select id="choose-linear">{options}</select></label>'
        f'<div id="card" aria-live="polite">{linear_card(report, first)}</div>'
        f'<script type="application/json" id="cards">{cards.replace("<", chr(92) + "u003c")}</script>'
    )
    lead = "What was decided, which operation pinned its basis, what would free it; grey is before, colour after."
    return Section("linear", "One linear", body, lead if report.spreads else lead.partition(";")[0] + ".")


def _option(report: InspectorReport, x: LinearRow, *, chosen: bool) -> str:
    name = escape(x.name)
    return (
        f'<option value="{name}"{" selected" if chosen else ""}>{escape(x.name.removeprefix(report.prefix))}</option>'
    )


def linear_table(report: InspectorReport) -> tuple[Table, tuple[str, ...]]:
    """Return one row a linear, and the rows' anchors. Columns of a quantization are there where it was done."""
    columns = ["linear", ">shape", "input", "basis of the input", "why"]
    if report.measured:
        columns[2:2] = [">true bits", ">weight error", ">output error"]
    rows = []
    for x in report.linears:
        measured = (number(x.true_bits), number(x.weight_error), number(x.output_error)) if report.measured else ()
        name = x.name.removeprefix(report.prefix)
        rows.append(
            row(
                name, x.sizes, *measured, Cell(x.decision, x.decision), _near(x.input, x.block), Cell(x.reason, "quiet")
            )
        )
    return Table("", tuple(columns), tuple(rows)), tuple(f"linear-{x.name}" for x in report.linears)


def _near(basis: str, block: str) -> str:
    """Return a basis as seen from its own block."""
    return basis.replace(block + ".", "") if block else basis


def linear_section(report: InspectorReport) -> Section:
    """Return the table of all linears."""
    table, ids = linear_table(report)
    return Section("linears", "Linears", _folded(table, ids))


def skipped_table(report: InspectorReport) -> Table:
    """Return what each pass left alone, with its reason."""
    rows = tuple(row(p.name, what, Cell(reason, "quiet")) for p in report.passes for what, reason in p.skipped)
    return Table("Left alone by the passes", ("pass", "what", "why"), rows)

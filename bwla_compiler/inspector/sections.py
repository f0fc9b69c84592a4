"""The page's sections on one model: dataflow, heat map, linears, bases, norms, passes."""

from html import escape

from bwla_compiler.inspector.cost import crossover_table, device_table, group_table
from bwla_compiler.inspector.diagram import block_svg, palette
from bwla_compiler.inspector.page import Section, render_page, table_html
from bwla_compiler.inspector.report import LETTERS, MEANINGS, BlockRow, InspectorReport, LinearRow
from bwla_compiler.inspector.table import Cell, Table, number, row, size
from bwla_compiler.inspector.terminal import basis_table, norm_table, pass_table, unknown_table

WIDE = 14
"""Number of blocks up to which a heat map also writes its numbers."""


def report_page(report: InspectorReport) -> str:
    """Return the page on one model."""
    recipe = f", recipe {report.recipe}" if report.recipe else ""
    title = report.source or report.model
    return render_page(title, report_sections(report), subtitle=f"{report.model}{recipe}", facts=report_facts(report))


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
    return tuple(facts)


def report_sections(report: InspectorReport) -> list[Section]:
    """Return the sections that have something to show."""
    found = [flow_section(report, i, block) for i, block in enumerate(report.blocks) if block.names[0]]
    if any(block.names[0] for block in report.blocks):
        found.append(map_section(report))
    found.append(linear_section(report))
    tables = [("bases", basis_table(report)), ("norms", norm_table(report)), ("passes", pass_table(report))]
    tables.append(("unknown", unknown_table(report)))
    if report.cost:
        tables += [("decoding", device_table(report.cost)), ("crossover", crossover_table(report.cost))]
        tables.append(("cost", group_table(report.cost)))
    for key, table in tables:
        if table.rows:
            plain = Table("", table.columns, table.rows, table.note)
            found.append(Section(key, table.title, table_html(plain)))
    if skipped := skipped_table(report).rows:
        found.append(
            Section("skipped", "Left alone by the passes", table_html(Table("", ("pass", "what", "why"), skipped)))
        )
    return found


def flow_section(report: InspectorReport, index: int, block: BlockRow) -> Section:
    """Return the picture of one block with its legend; the letters are explained beside it."""
    times = f" x {len(block.names)}" if len(block.names) > 1 else ""
    used = dict.fromkeys(linear.decision for linear in block.linears)
    letters = "".join(
        f'<li><span class="swatch {d}">{letter}</span><span>{d}<small>{escape(MEANINGS[d])}</small></span></li>'
        for d, letter in LETTERS.items()
        if d in used
    )
    body = (
        f'<div class="flow-side"><div class="scroll">{block_svg(block, report.norms)}</div>'
        f'<div><h3>Inputs</h3><ul class="legend">{letters}</ul>'
        f'<h3>Bases</h3><ul class="legend">{_basis_legend(report, block)}</ul></div></div>'
    )
    lead = (
        "Lines carry the colour of the basis that their tensor lives in; dashed grey is pinned. A box leads to its row."
    )
    return Section(f"block-{index}", f"{block.label}{times}", body, lead)


def _basis_legend(report: InspectorReport, block: BlockRow) -> str:
    known = {basis.name: basis for basis in report.bases}
    colours = palette(block)
    items = []
    for name in sorted(colours.names, key=lambda n: n != "residual"):
        basis = known.get(name)
        text = f"{basis.size} channels, {basis.freedom}. {basis.reason}" if basis else ""
        items.append(_legend_item(colours.of(name), name, text))
    items.append(_legend_item("pinned", "pinned", "an operation fixes these channels: no rotation folds here"))
    return "".join(items)


def _legend_item(role: str, name: str, text: str) -> str:
    return f'<li><span class="swatch {role}"></span><span>{escape(name)}<small>{escape(text)}</small></span></li>'


def map_section(report: InspectorReport) -> Section:
    """Return layers against linears: the output's error where it was measured, else the decisions."""
    names = [name for block in report.blocks for name in block.names if name]
    names.sort(key=[x.block for x in report.linears].index)
    shorts = list(dict.fromkeys(x.short for x in report.linears if x.block))
    cells = {(x.short, x.block): x for x in report.linears}
    top = max((_error(x) or 0.0 for x in report.linears if x.block), default=0.0)
    head = "".join(f'<th scope="col" title="{escape(n)}">{escape(_index(n))}</th>' for n in names)
    rows = "".join(
        f'<tr><th scope="row">{escape(short)}</th>'
        + "".join(_map_cell(cells.get((short, n)), top, len(names) <= WIDE) for n in names)
        + "</tr>"
        for short in shorts
    )
    what = (
        "Relative output error of each linear; darker is worse."
        if report.measured
        else "What was decided for each linear's input."
    )
    body = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Layers against linears">'
        f'<table class="map"><thead><tr><th scope="col">layer</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    return Section("map", "Layers and linears", body, what)


def _index(block: str) -> str:
    return next((part for part in reversed(block.split(".")) if part.isdigit()), block)


def _error(linear: LinearRow) -> float | None:
    return linear.output_error if linear.output_error is not None else linear.weight_error


def _map_cell(linear: LinearRow | None, top: float, text: bool) -> str:
    if linear is None:
        return "<td></td>"
    error = _error(linear)
    if error is None:
        hint = f"{escape(linear.name)}: {linear.decision}"
        return f'<td class="{linear.decision}" title="{hint}">{LETTERS[linear.decision]}</td>'
    level = f"{5 + 65 * error / top:.0f}%" if top else "5%"
    shown = f"{error:.2g}" if text else ""
    return f'<td class="heat" style="--level:{level}" title="{escape(linear.name)}: {error:.3g}">{shown}</td>'


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
    return Section("linears", "Linears", table_html(table, ids=ids))


def skipped_table(report: InspectorReport) -> Table:
    """Return what each pass left alone, with its reason."""
    rows = tuple(row(p.name, what, Cell(reason, "quiet")) for p in report.passes for what, reason in p.skipped)
    return Table("Left alone by the passes", ("pass", "what", "why"), rows)

"""The report in a terminal: a tree of one block, tables, and reasons; plain text where there are no colours."""

from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text
from rich.tree import Tree

from bwla_compiler.inspector.collapse import collapse_bases, collapse_norms, mask
from bwla_compiler.inspector.cost import crossover_table, device_table, plain_regions, region_table
from bwla_compiler.inspector.report import (
    LETTERS,
    MEANINGS,
    BlockRow,
    InspectorReport,
    LinearRow,
)
from bwla_compiler.inspector.sparks import parts_table, spread_table
from bwla_compiler.inspector.table import Cell, Table, duration, row, size

WIDE = 120
"""Columns of a terminal from which tables also name the kernels, and all devices side by side."""

STYLES = {
    "folded": "green",
    "partial": "yellow",
    "online": "blue",
    "alone": "bright_black",
    "best": "bold green",
    "quiet": "bright_black",
    "": "",
}


def render_table(table: Table) -> RenderableType:
    """Return a table for a rich console; it wraps where the terminal is narrow."""
    grid = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(table.columns):
        right = column.startswith(">")
        whole = all(len(cells[i].text) <= 40 for cells in table.rows) and i + 1 < len(table.columns)
        grid.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=whole)
    for cells in table.rows:
        grid.add_row(*(Text(cell.text, style=STYLES.get(cell.role, "")) for cell in cells))
    parts: list[RenderableType] = [Text(table.title, style="bold underline"), grid] if table.title else [grid]
    if table.note:
        parts.append(Text(table.note, style="bright_black"))
    return Group(*parts)


def summary(report: InspectorReport) -> str:
    """Return one line: how many linears, and how many of each decision."""
    counts = ", ".join(f"{n} {decision}" for decision, n in report.counts.items() if n)
    n_blocks = sum(len(block.names) for block in report.blocks if block.names != ("",))
    return f"{len(report.linears)} linears in {n_blocks} blocks: {counts}"


def block_tree(block: BlockRow) -> Tree:
    """Return the tree of one block: a letter, name, shape and input basis a linear; reasons below."""
    times = f"  x {len(block.names)}" if len(block.names) > 1 else ""
    tree = Tree(Text.assemble((block.label or "outside the blocks", "bold"), times))
    width = max(len(linear.short) for linear in block.linears)
    explained: set[str] = set()
    for linear in block.linears:
        branch = tree.add(_linear_line(linear, width))
        reason = mask(linear.reason)
        if linear.reason and reason not in explained:  # one reason is often that of a whole group
            branch.add(Text(linear.reason, style="bright_black"))
            explained.add(reason)
    return tree


def _linear_line(linear: LinearRow, width: int) -> Text:
    style = STYLES[linear.decision]
    parts = [
        (f"{LETTERS[linear.decision]} ", f"bold {style}"),
        (linear.short.ljust(width), ""),
        (f"  {linear.sizes.replace('→', '->')}", ""),
        (f"  {linear.input}", style),
    ]
    if linear.true_bits is not None:
        parts.append((f"  {linear.true_bits:.2f} bit", ""))
    if linear.output_error is not None:
        parts.append((f"  error {linear.output_error:.3g}", ""))
    return Text.assemble(*parts)


def basis_table(report: InspectorReport) -> Table:
    """Return the bases, those of repeated blocks on one row."""
    rows = []
    for name, count, basis in collapse_bases(report.bases):
        role = "alone" if basis.freedom == "pinned" else "folded"
        held = f"{len(basis.writers)} / {len(basis.readers)}"
        shown = _repeated(name.removeprefix(report.prefix), count)
        rows.append(row(shown, basis.size, Cell(basis.freedom, role), held, basis.reason))
    return Table(
        "Bases", ("basis", ">size", "freedom", ">w/r", "why"), tuple(rows), "w/r: how many modules write and read it"
    )


def _repeated(name: str, count: int) -> str:
    """Return a name with how often it stands for one, where its {range} does not say so."""
    return f"{name}  x {count}" if count > 1 and "{" not in name else name


def norm_table(report: InspectorReport) -> Table:
    """Return the norms, repeated ones on one row, and what became of their gains."""
    rows = []
    for name, count, norm in collapse_norms(report.norms):
        n = len(norm.absorbed_by)
        became = f"absorbed by {n} linear{'s' * (n > 1)}" if n else f"stays: {norm.reason}"
        shown = _repeated(name.removeprefix(report.prefix), count)
        rows.append(row(shown, Cell(became, "folded" if n else "alone")))
    return Table("Norms", ("gain", "became"), tuple(rows))


def pass_table(report: InspectorReport) -> Table:
    """Return the passes with their times."""
    rows = tuple(row(p.name, p.n_changed, len(p.skipped), duration(p.seconds)) for p in report.passes)
    return Table("Passes", ("pass", ">changed", ">skipped", ">time"), rows)


def legend(report: InspectorReport) -> Text:
    """Return what the letters mean, those that occur."""
    text = Text()
    for decision, count in report.counts.items():
        if count:
            text.append(f"{LETTERS[decision]} ", style=f"bold {STYLES[decision]}")
            text.append(f"{decision}: {MEANINGS[decision]}\n", style="bright_black")
    return text


def unknown_table(report: InspectorReport) -> Table:
    """Return the operations without a rule; each pins what it touches, which is safe."""
    rows = tuple(row(name, count) for name, count in sorted(report.unknown.items()))
    return Table(
        "Operations without a rule", ("operation", ">pinned"), rows, "They pin what they touch: safe, not wrong."
    )


def print_report(report: InspectorReport, console: Console) -> None:
    """Print a report: summary, blocks, bases, norms, passes, and what is not known."""
    recipe = f"  recipe {report.recipe}" if report.recipe else ""
    console.print(Text.assemble((report.model, "bold"), f"  {report.source}{recipe}"))
    console.print(summary(report), highlight=False)
    if report.repeated:
        console.print(f"{report.repeated}.", style="bright_black", highlight=False)
    if report.bits:
        bits = report.bits
        console.print(
            f"true bits per weight: {bits.linears:.2f} linears, {bits.model:.2f} model, {size(bits.n_bytes)}",
            highlight=False,
        )
    console.print()
    for block in report.blocks:
        console.print(block_tree(block))
    console.print()
    console.print(legend(report))
    tables = [basis_table(report), norm_table(report), pass_table(report), unknown_table(report)]
    if report.spreads:
        tables.insert(0, spread_table(report))
    if report.cost:
        wide = console.width >= WIDE
        regions = region_table(report.cost) if wide else plain_regions(report.cost)
        crossovers = crossover_table(report.cost, only="" if wide else report.cost.chosen)
        tables += [parts_table(report.cost), regions, device_table(report.cost), crossovers]
    for table in tables:
        if table.rows:
            console.print(render_table(table))
            console.print()
    for embedding, head in report.tied:
        console.print(f"tied: {head} reads {embedding}", highlight=False)

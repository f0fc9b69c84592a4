"""Tables and page of a demo's result, from the plain data that `bwla-compile demo --json` writes.

    {"models": {NAME: {"fp": {"perplexity": x, "n_bytes": n},
                       "recipes": {NAME: {"true_bits": x, "n_bytes": n, "a16": x, "a8": x, "a6": x, "a4": x}}}},
     "speed": {NAME: tokens per second or a text}}

Perplexities; n_bytes is the file's size; keys that are absent show as a dash.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

from bwla_compiler.inspector.page import Section, render_page, table_html
from bwla_compiler.inspector.report import InspectorReport
from bwla_compiler.inspector.sections import report_sections
from bwla_compiler.inspector.table import Cell, Table, best, fixed, row, size

COLUMNS = ("a16", "a8", "a6", "a4")
"""Activation bits of the perplexity columns."""


def quality_table(name: str, model: Mapping[str, Any]) -> Table:
    """Return one model's perplexities; the best of the recipes stands out in each column."""
    recipes: Mapping[str, Mapping[str, Any]] = model["recipes"]
    lowest = {column: best(r.get(column) for r in recipes.values()) for column in COLUMNS}
    fp = model["fp"]
    rows = [row("fp", fixed(fp["perplexity"]), "", "", "", fixed(fp.get("true_bits")), _bytes(fp))]
    for recipe, result in recipes.items():
        cells = [
            Cell(
                fixed(result.get(c)),
                "best" if result.get(c) is not None and result.get(c) == lowest[c] else "",
                f"{result[c] / fp['perplexity']:.3f}x" if result.get(c) is not None else "",
            )
            for c in COLUMNS
        ]
        rows.append(row(recipe, *cells, fixed(result.get("true_bits")), _bytes(result)))
    columns = ("recipe", *(f">{c.upper()}" for c in COLUMNS), ">true bits", ">file")
    return Table(name, columns, tuple(rows))


def _bytes(result: Mapping[str, Any]) -> str:
    return size(result["n_bytes"]) if "n_bytes" in result else "-"


def speed_table(speed: Mapping[str, Any]) -> Table:
    """Return tokens per second, fastest last as given; texts (device, versions) become the note."""
    rates = {k: float(v) for k, v in speed.items() if isinstance(v, (int, float))}
    fastest = max(rates.values(), default=None)
    rows = tuple(row(k, Cell(fixed(v, 1), "best" if v == fastest else "")) for k, v in rates.items())
    note = "; ".join(f"{k}: {v}" for k, v in speed.items() if isinstance(v, str))
    return Table("Speed", ("how", ">tokens/s"), rows, note)


def result_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables that the demo prints: quality of each model, then speed."""
    tables = [quality_table(name, model) for name, model in result["models"].items()]
    return [*tables, *([speed_table(result["speed"])] if result.get("speed") else [])]


def result_markdown(result: Mapping[str, Any]) -> str:
    """Return the same tables as Markdown, for the README."""
    return "\n\n".join(_markdown(table) for table in result_tables(result))


def _markdown(table: Table) -> str:
    head = "| " + " | ".join(c.lstrip(">") for c in table.columns) + " |"
    rule = "|" + "|".join("---:" if c.startswith(">") else "---" for c in table.columns) + "|"
    rows = [
        "| " + " | ".join(f"**{c.text}**" if c.role == "best" else c.text for c in cells) + " |" for cells in table.rows
    ]
    note = ["", table.note] if table.note else []
    return "\n".join([f"**{table.title}**", "", head, rule, *rows, *note])


def result_sections(result: Mapping[str, Any]) -> list[Section]:
    """Return the page's sections of a demo's result."""
    found = []
    for i, (name, model) in enumerate(result["models"].items()):
        quality = quality_table(name, model)
        body = table_html(Table("", quality.columns, quality.rows))
        lead = (
            "Perplexity on held-out text, lower is better; small: times that of fp. Columns: bits of the activations. "
            "True bits count every stored byte of the block linears."
        )
        found.append(Section(f"result-{i}", f"Quality on {name}", body, lead))
    if result.get("speed"):
        table = speed_table(result["speed"])
        found.append(Section("speed", "Speed", _bars(table), table.note or "Tokens per second on this machine."))
    return found


def _bars(table: Table) -> str:
    rates = [float(cells[1].text.replace(",", "")) for cells in table.rows]
    top = max(rates, default=1.0) or 1.0
    rows = "".join(
        f'<span>{escape(cells[0].text)}</span><span class="bar" style="width:{100 * rate / top:.1f}%"></span>'
        f"<span>{escape(cells[1].text)} tokens/s</span>"
        for cells, rate in zip(table.rows, rates, strict=True)
    )
    return f'<div class="bars">{rows}</div>'


def result_facts(result: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the head's numbers: the best recipe at 6 bits of each model, over fp."""
    facts = []
    for name, model in result["models"].items():
        lowest = best(r.get("a6") for r in model["recipes"].values())
        if lowest is not None:
            facts.append((f"{lowest / model['fp']['perplexity']:.3f}x", f"perplexity over fp at A6, {name}"))
    bits = best(r.get("true_bits") for n, r in next(iter(result["models"].values()))["recipes"].items() if "bwla" in n)
    return (*facts, *([(f"{bits:.2f}", "true bits per linear weight")] if bits is not None else []))


def result_page(result: Mapping[str, Any], report: InspectorReport | None = None, *, subtitle: str = "") -> str:
    """Return the demo's page: results first, then the inspector's view of the model where it is given."""
    sections = result_sections(result) + (report_sections(report) if report else [])
    return render_page("bwla-compiler: results of the demo", sections, subtitle=subtitle, facts=result_facts(result))

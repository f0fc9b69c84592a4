"""One self-contained HTML page: a head, a list of sections, light and dark, no network, readable on a phone."""

import functools
from dataclasses import dataclass
from html import escape
from importlib import resources

from bwla_compiler.inspector.table import Cell, Table


@dataclass(frozen=True)
class Section:
    """One part of a page. key: its anchor; body: HTML that the maker has escaped; lead: plain text below the title.

    link: what links to it are called, the title if "".
    """

    key: str
    title: str
    body: str
    lead: str = ""
    link: str = ""


def render_page(
    title: str, sections: list[Section], *, subtitle: str = "", facts: tuple[tuple[str, str], ...] = ()
) -> str:
    """Return the page. facts: numbers for the head, (value, what it is)."""
    links = "".join(f'<a href="#{s.key}">{escape(s.link or s.title)}</a>' for s in sections)
    numbers = "".join(f"<li><b>{escape(value)}</b><span>{escape(name)}</span></li>" for value, name in facts)
    body = "\n".join(_section(s) for s in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style()}</style></head>\n<body>"
        f'<a class="skip" href="#content">Skip to the content</a>'
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"
        f'<ul class="facts">{numbers}</ul><nav aria-label="Sections">{links}</nav></header>\n'
        f'<main id="content">{body}</main><script>{script()}</script></body></html>\n'
    )


@functools.cache
def style() -> str:
    """Return the page's style sheet."""
    return (resources.files("bwla_compiler.inspector") / "page.css").read_text("utf-8")


@functools.cache
def script() -> str:
    """Return the page's script: all that it does can be seen without it, too."""
    return (resources.files("bwla_compiler.inspector") / "page.js").read_text("utf-8")


def _section(section: Section) -> str:
    lead = f'<p class="lead">{escape(section.lead)}</p>' if section.lead else ""
    return (
        f'<section id="{escape(section.key)}" aria-labelledby="{escape(section.key)}-title">'
        f'<h2 id="{escape(section.key)}-title">{escape(section.title)}</h2>{lead}{section.body}</section>'
    )


def table_html(table: Table, *, ids: tuple[str, ...] = ()) -> str:
    """Return a table that scrolls sideways where it is too wide. ids: one anchor a row, for links to it."""
    classes = ["number" if c.startswith(">") else "" for c in table.columns]
    names = [c.lstrip(">") for c in table.columns]
    head = "".join(
        f'<th scope="col"{_attribute("class", kind)}>{escape(name)}</th>'
        for name, kind in zip(names, classes, strict=True)
    )
    rows = "".join(
        f"<tr{_attribute('id', ids[i]) if ids else ''}>{_cells(cells, classes, names)}</tr>"
        for i, cells in enumerate(table.rows)
    )
    caption = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    label = escape(table.title or "table")
    return (
        f'{caption}<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _cells(cells: tuple[Cell, ...], classes: list[str], names: list[str]) -> str:
    """Return a row's cells; each says what its column is called, for screens that have no room for columns."""
    parts = []
    for i, (cell, kind, name) in enumerate(zip(cells, classes, names, strict=True)):
        text = f'<span class="{cell.role}">{escape(cell.text)}</span>' if cell.role else escape(cell.text)
        text += f" <small>{escape(cell.note)}</small>" if cell.note else ""
        attributes = f"{_attribute('class', kind)}{_attribute('data-of', name if cell.text else '')}"
        parts.append(f'<th scope="row">{text}</th>' if i == 0 else f"<td{attributes}>{text}</td>")
    return "".join(parts)


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escape(value)}"' if value else ""

"""The zoo's rows as Markdown and as JSON."""

import dataclasses
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import transformers

from bwla_compiler.graph.plan import Decision
from bwla_compiler.zoo.run import Kind, Status, ZooRow

_STATUSES: tuple[Status, ...] = ("exact", "wrong", "refused", "not built")

_LEGEND = """\
Each architecture is a model of two layers with random weights. *Exact*: a random rotation in every free space, folded
into the weights together with the gains of the norms, left the logits as they were, in float64. *Folds*: linears whose
input is rotated at no cost. *Partial*: the factor within a head folds, the one across heads is applied at run time.
*Online*: the whole rotation is applied at run time. *Alone*: not quantized. *Quantized*: the share of the weights in
matrix products that belongs to linears which are not left alone."""


def versions() -> dict[str, str]:
    """Return what decides about the result besides the project: the versions of Python, torch and transformers."""
    return {"Python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def summary(rows: Sequence[ZooRow]) -> str:
    """Return the counts in one line: architectures, built, captured, and by status."""
    found = Counter(row.status for row in rows)
    built = len(rows) - found["not built"]
    captured = sum(row.captured for row in rows)
    counts = ", ".join(f"{found[status]} {status}" for status in _STATUSES[:3])
    return f"{len(rows)} architectures: {built} built, {captured} captured; {counts}"


def to_json(rows: Sequence[ZooRow], *, command: str, versions: dict[str, str]) -> str:
    """Return the rows as JSON, with the command and the versions that made them."""
    table = [dataclasses.asdict(row) for row in rows]
    return json.dumps({"command": command, "versions": versions, "summary": summary(rows), "rows": table}, indent=1)


def to_markdown(rows: Sequence[ZooRow], *, command: str, versions: dict[str, str]) -> str:
    """Return the rows as a page: counts, one line an architecture, and what was refused, wrong or not built."""
    made_by = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        "# Architectures",
        f"Written by `{command}` with {made_by}. Do not edit.",
        f"**{summary(rows)}.**",
        _LEGEND,
    ]
    compared = [row for row in rows if row.status in ("exact", "wrong")]
    if compared:
        parts.append(_compared_table(compared))
        parts.append("## What does not fold, and why\n\n" + "\n".join(_reasons(row) for row in compared if _held(row)))
    parts += [_failures(rows, status) for status in _STATUSES[1:] if any(r.status == status for r in rows)]
    if unknown := _unknown(compared):
        parts.append(unknown)
    return "\n\n".join(parts) + "\n"


def _compared_table(rows: Iterable[ZooRow]) -> str:
    lines = [
        "| architecture | class | folds | partial | online | alone | quantized | free spaces | error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        counts = [str(row.decisions.get(d, 0)) for d in ("folded", "partial", "online", "alone")]
        figures = [f"{row.share:.0%}", str(row.n_free), f"{row.error:.0e}"]
        lines.append("| " + " | ".join([row.name, row.architecture, *counts, *figures]) + " |")
    return "\n".join(lines)


def _held(row: ZooRow) -> list[Kind]:
    return [kind for kind in row.kinds if kind.decision != "folded"]


def _reasons(row: ZooRow) -> str:
    """Return one architecture's linears that do not fold, those of one decision and reason together."""
    groups: dict[tuple[Decision, str], dict[str, None]] = {}
    for kind in _held(row):
        short = kind.name.rpartition(".N.")[2]
        groups.setdefault((kind.decision, kind.reason), {})[f"`{short}`"] = None
    clauses = (f"{', '.join(names)} {decision} ({_cell(reason)})" for (decision, reason), names in groups.items())
    return f"- **{row.name}**: " + "; ".join(clauses)


def _failures(rows: Iterable[ZooRow], status: Status) -> str:
    lines = [f"- **{row.name}**: {_cell(row.reason)}" for row in rows if row.status == status]
    return f"## {status.capitalize()}\n\n" + "\n".join(lines)


def _unknown(rows: Iterable[ZooRow]) -> str:
    """Return the operations without a rule and the architectures that use them, the most frequent first."""
    users: dict[str, list[str]] = {}
    for row in rows:
        for operation in row.unknown:
            users.setdefault(operation, []).append(row.name)
    ordered = sorted(users.items(), key=lambda item: (-len(item[1]), item[0]))
    lines = [f"- `{operation}`, in {len(names)}: {', '.join(names)}" for operation, names in ordered]
    intro = "What they read and write keeps its basis, which is never wrong."
    return f"## Operations without a rule\n\n{intro}\n\n" + "\n".join(lines) if lines else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")

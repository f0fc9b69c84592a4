"""The zoo's rows as Markdown and as JSON."""

import dataclasses
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import transformers

from bwla_compiler.graph.plan import Decision
from bwla_compiler.zoo.compiled import LENGTHS, RECIPE, TOLERANCES, Compiled, Verdict
from bwla_compiler.zoo.run import Kind, Status, ZooRow

_STATUSES: tuple[Status, ...] = ("exact", "wrong", "refused", "not built")

_LEGEND = """\
Each architecture is a model of two layers with random weights. *Exact*: a random rotation in every free space, folded
into the weights together with the gains of the norms, left the logits as they were, in float64, and int8 ends moved
them no further than a hundredth of noise in the weights does. *Folds*: linears whose input is rotated at no cost.
*Partial*: the factor within a head folds, the one across heads is applied at run time. *Online*: the whole rotation is
applied at run time. *Alone*: not quantized. *Quantized*: the share of the weights in matrix products that belongs to
linears which are not left alone."""

_VERDICTS: tuple[Verdict, ...] = ("exact", "wrong", "broken", "floats", "refused")

_COMPILED_LEGEND = f"""\
Each captured model was quantized with `{RECIPE}`, calibrated on its own samples, and called under
`torch.compile(model, backend="bwla", fullgraph=True)` with {len(LENGTHS)} lengths of input. *Exact*: one graph, and the
logits of the quantized model run eagerly, up to a relative error (by the norm) of {TOLERANCES["door"]:g} *at the door*,
which is where Inductor would take over and the graph runs as it is, and of {TOLERANCES["whole"]:g} the *whole* way
(the first length alone), where kernels sum in another order and an activation at the edge of two codes may round the
other way; at the door too where Dynamo itself computes a number in another way, and then they are compared without
rounding as well. *Broken*: right, in several graphs. *Floats*: no packed weight would have been used. *Raw*: the float
model compiled, which the backend quantizes on the way. *Quantized* counts the weights that were packed. *Bits* are true
bits a weight, of the block linears and of the whole model. *Graphs* are those of the first call, and of the
{len(LENGTHS)} lengths together."""


def versions() -> dict[str, str]:
    """Return what decides about the result besides the project: the versions of Python, torch and transformers."""
    return {"Python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def summary(rows: Sequence[ZooRow]) -> str:
    """Return the counts in one line: architectures, built, captured, and by status."""
    found = Counter(row.status for row in rows)
    built = len(rows) - found["not built"]
    captured = sum(row.captured for row in rows)
    counts = ", ".join(f"{found[status]} {status}" for status in _STATUSES[:3])
    line = f"{len(rows)} architectures: {built} built, {captured} captured; {counts}"
    packed = [row.compiled for row in rows if row.compiled is not None]
    raw = [row.raw for row in rows if row.raw is not None]
    tried = (("compiled", packed, captured), ("compiled raw", raw, len(raw)))
    return "; ".join([line, *(_tally(what, models, total) for what, models, total in tried if models)])


def _tally(what: str, found: Sequence[Compiled], total: int) -> str:
    """Return how many of the models in question compiled in one graph, and what became of the others."""
    counts = Counter(x.status for x in found)
    whole = sum(x.depth == "whole" and x.status == "exact" for x in found)
    share = f"{counts['exact']} of {total} ({counts['exact'] / max(1, total):.1%}), {whole} of them the whole way"
    others = ", ".join(f"{counts[v]} {v}" for v in _VERDICTS[1:] if counts[v] or v == "wrong")
    return f"{what} in one graph {share}; {others}"


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
    if any(row.compiled for row in rows):
        parts += _compiled_parts(rows)
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


def _compiled_parts(rows: Sequence[ZooRow]) -> list[str]:
    """Return the section on quantizing and compiling: legend, table, and what did not go as it should."""
    lines = [
        "| architecture | quantized | bits | graphs | compiled | error | raw |",
        "| --- | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    failures = []
    for row in rows:
        if (found := row.compiled) is None:
            continue
        share, bits = ("", "")
        if row.packed is not None:
            share, bits = f"{row.packed.share:.0%}", f"{row.packed.linear_bits:.2f}, {row.packed.model_bits:.2f}"
        graphs = f"{found.n_graphs}, {found.n_lengths}" if found.n_graphs else ""
        error = "" if found.error is None else f"{found.error:.0e}"
        raw = "" if row.raw is None else shown(row.raw)
        lines.append("| " + " | ".join([row.name, share, bits, graphs, shown(found), error, raw]) + " |")
        for what, x in (("", found), (", raw", row.raw)):
            if x is not None and x.reason:
                failures.append(f"- **{row.name}**{what}, {x.status}: {_cell(x.reason)}")
    parts = ["## Quantized and compiled", _COMPILED_LEGEND, "\n".join(lines)]
    return [*parts, "\n".join(failures)] if failures else parts


def shown(found: Compiled) -> str:
    """Return what became of a model in torch.compile in two or three words."""
    way = "whole" if found.depth == "whole" else "door"
    return f"{found.status}, {way}" + ("" if found.cached else ", no cache")


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

"""The whole report of three architectures, as data and as text: a change of any word is seen and read in review.

After a change that is meant: `python -m pytest tests/inspector/test_golden.py --rewrite-goldens`, then `git diff`.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from bwla_compiler.inspection import inspect_module
from bwla_compiler.inspector.report import InspectorReport, PassRow
from bwla_compiler.inspector.terminal import print_report
from bwla_compiler.zoo.models import tiny_model
from tests import planned, tiny

Golden = Callable[[str, str], None]

ARCHITECTURES = ("qwen3", "gpt2", "mixtral")
"""Dense with grouped heads, biases and LayerNorms in one stack, a mixture of experts."""

DIGITS = 5
"""Of the figures that are kept: sums in another order, or another libm, move those behind."""


@functools.cache
def report(name: str) -> InspectorReport:
    """Return the report on a tiny model, with a pass whose time is that of this machine."""
    model = tiny.make(name) if name in tiny.CONFIGS else tiny_model(name)
    found = inspect_module(model, plan=planned.plan(name), source=f"tiny {name}")
    return dataclasses.replace(found, passes=(PassRow("fold-norms", 3, (("norm", "why"),), 0.1234567),))


def without_machine(report: InspectorReport) -> InspectorReport:
    """Return a report whose times are those of no machine."""
    return dataclasses.replace(report, passes=tuple(dataclasses.replace(p, seconds=0.0) for p in report.passes))


def rounded(value: Any) -> Any:
    """Return data with DIGITS digits of each figure, and of the modelled devices the one that is shown."""
    if isinstance(value, dict):
        chosen = value.get("chosen")
        kept = {
            k: [d for d in v if d["device"] == chosen] if k == "devices" and chosen else v for k, v in value.items()
        }
        return {k: rounded(v) for k, v in kept.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_data(name: str, golden: Golden) -> None:
    data = rounded(json.loads(without_machine(report(name)).to_json()))
    golden(f"{name}.json", json.dumps(data, indent=1) + "\n")


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_text_in_a_pipe(name: str, width: int, golden: Golden) -> None:
    out = io.StringIO()
    print_report(without_machine(report(name)), Console(file=out, width=width))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    assert "\x1b" not in out.getvalue()
    golden(f"{name}-{width}.txt", "\n".join(lines) + "\n")

"""The plan as data: the same in every process, exact in JSON, strict when it is read."""

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bwla_compiler.errors import PlanError
from bwla_compiler.graph.network import to_graphml
from bwla_compiler.graph.plan import SCHEMA, Plan
from tests import planned

ARCHITECTURE = "phi3"  # fused weights: products, sums and pinned parts


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned.plan(ARCHITECTURE)


def digest(plan: Plan) -> str:
    """Return a hash of all that is written of a plan."""
    return hashlib.sha256((plan.to_json() + to_graphml(plan)).encode()).hexdigest()


def test_every_process_writes_the_same_bytes(plan: Plan) -> None:
    code = "from tests.graph.test_plan import ARCHITECTURE, digest, planned\nprint(digest(planned.plan(ARCHITECTURE)))"
    seed = "0" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # this process draws its own, or has another
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == digest(plan)


def test_json_is_exact_and_carries_its_version(plan: Plan) -> None:
    text = plan.to_json()
    assert next(iter(json.loads(text).items())) == ("schema", SCHEMA)
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    assert [table.parameter for table in plan.embeddings] == ["model.embed_tokens.weight"]


def changed(table: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy with the entry at a dotted path replaced; KeyError's stand-in "-" removes it."""
    table = copy.deepcopy(table)
    place: Any = table
    *above, last = path.split(".")
    for part in above:
        place = place[int(part)] if part.isdigit() else place[part]
    if value == "-":
        del place[last]
    else:
        place[last] = value
    return table


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("schema", "-", "'schema' is missing"),
        ("schema", "bwla-plan/0", "version 'bwla-plan/0'"),
        ("norms", "-", "keys missing or unknown: norms"),
        ("more", 1, "keys missing or unknown: more"),
        ("linears.0.decision", "maybe", r"plan.linears\[0\].decision: expected"),
        ("linears.0.in_axis", "1", r"plan.linears\[0\].in_axis: expected int, found '1'"),
        ("linears.0.in_axis", True, "expected int, found True"),
        ("linears.0.bias", 3, "bias: expected str, found 3"),
        ("linears.0.input", None, r"input: expected a table"),
        ("linears", {}, "plan.linears: expected a list"),
        ("tied", [["a"]], r"plan.tied\[0\]: expected a list of 2"),
        ("linears.0.in_features", 65, "sizes that differ"),
        ("groups.0.linears", ["nobody"], "names nobody, which is no linear"),
        ("norms.0.absorbed_by", ["nobody"], "names nobody, which is no linear"),
        ("bases", [], "which is no basis"),
        ("unknown", {"op": "many"}, "plan.unknown.op: expected int"),
    ],
)
def test_a_damaged_plan_is_one_clear_error(plan: Plan, path: str, value: Any, words: str) -> None:
    table = changed(json.loads(plan.to_json()), path, value)
    with pytest.raises(PlanError, match=words):
        Plan.from_json(json.dumps(table))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema": "bwla-plan/1"'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="plan"):
        Plan.from_json(text)


def test_a_truncated_file_is_refused(plan: Plan) -> None:
    text = plan.to_json()
    for end in range(1, len(text) - 1, max(1, len(text) // 23)):
        with pytest.raises(PlanError, match="the plan is damaged"):
            Plan.from_json(text[:end])

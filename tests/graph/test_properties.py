"""No rotation that the plan calls free changes the function: random graphs, Haar matrices, float64."""

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from bwla_compiler.errors import PlanError
from tests.graph.growing import grow

EXACT = 1e-10
"""Relative, in float64: rounding through some twenty operations leaves 1e-13, a wrong fold 1e-3 or more."""

QUIETLY = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def _check(data: st.DataObject, *, most: int) -> None:
    built = grow(data, most=most)
    note(str(built.gm.graph))
    try:
        error, plan = built.error_after_rotations()
    except PlanError:  # nothing but raw products of parameters
        return
    note("\n".join(f"{b.name} {b.size} {b.freedom} {b.reason}" for b in plan.bases))
    note("\n".join(f"{a.parameter} {a.axis} {a.expression}" for a in plan.axes))
    note("\n".join(str(n) for n in plan.norms))
    assert error <= EXACT


@settings(max_examples=60, **QUIETLY)  # type: ignore[arg-type]
@given(st.data())
def test_what_is_free_may_be_rotated(data: st.DataObject) -> None:
    _check(data, most=10)


@pytest.mark.exhaustive
@pytest.mark.slow
@settings(max_examples=5000, **QUIETLY)  # type: ignore[arg-type]
@given(st.data())
def test_what_is_free_may_be_rotated_in_larger_graphs(data: st.DataObject) -> None:
    _check(data, most=25)

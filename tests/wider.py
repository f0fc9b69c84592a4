"""Values of a parameter that only `make test-all` tries."""

from typing import Any

import pytest


def wider(*values: Any) -> list[Any]:
    """Return values, or tuples of the values of several parameters, marked for the exhaustive run."""
    mark = pytest.mark.exhaustive
    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=mark) for value in values]

"""Values of a parameter that only `make test-all` tries."""

from typing import Any

import pytest


def wider(*values: Any) -> list[Any]:
    """Return values marked for the exhaustive run."""
    return [pytest.param(value, marks=pytest.mark.exhaustive) for value in values]

"""Values of a parameter that only `make test-all` tries."""

from typing import Any

import pytest

from tests import tiny


def wider(*values: Any) -> list[Any]:
    """Return values marked for the exhaustive run."""
    return [pytest.param(value, marks=pytest.mark.exhaustive) for value in values]


DIFFERENT = ("llama", "phi3", "gpt2", "opt")
ARCHITECTURES = [*DIFFERENT, *wider(*(name for name in tiny.SEVEN if name not in DIFFERENT))]
"""The seven first architectures; those whose graphs are much like Llama's are left to the exhaustive run."""

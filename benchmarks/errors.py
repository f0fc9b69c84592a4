"""Errors of the harness; the command line says each in one line."""

from bwla_compiler.errors import BwlaError


class ResultsError(BwlaError, ValueError):
    """Results are missing or unreadable, of devices that cannot be compared, or asked for by a name that is unknown."""


class RefusedError(BwlaError, RuntimeError):
    """A contender's result is wrong, so its time is worth nothing."""


class ContenderError(BwlaError, RuntimeError):
    """A process that was to be measured ended; holds the last line that it said."""

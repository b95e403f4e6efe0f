"""One clear message for a user's mistake."""

from __future__ import annotations

from jsonargparse import ArgumentError


class UserError(Exception):
    """A mistake in a config or on the command line. The command line shows the message and no traceback."""


def explain(error: Exception) -> str | None:
    """Returns the message for a user's mistake, and None for any other error."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, ArgumentError):
        return f"error: {error}"
    return None

"""`kdvit distillers`: the objectives that a config can name."""

from __future__ import annotations

from kdvit.tables import text_table


def distillers() -> None:
    """List the objectives by their short names.

    Examples:
        kdvit distillers
    """
    from kdvit.distillers.plugins import known_distillers, load_plugins

    load_plugins()
    print(text_table((), list(known_distillers().items()), left=2))

"""Distillers of other projects."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points

from kdvit.distillers import Distiller
from kdvit.structures import subclasses

GROUP = "kdvit.distillers"


def load_plugins() -> None:
    """Imports every distiller that an installed package declares under the entry-point group `kdvit.distillers`.

    Once imported, its short class name is known to the command line.

    Raises:
        TypeError: If an entry point is no Distiller.
    """
    for entry in entry_points(group=GROUP):
        loaded = entry.load()
        if not (inspect.isclass(loaded) and issubclass(loaded, Distiller)):
            raise TypeError(f"The entry point {entry.name!r} of group {GROUP!r} must be a Distiller, got {loaded!r}.")


def known_distillers() -> dict[str, str]:
    """Returns the short names of the imported distillers with the first line of their documentation."""
    every: dict[str, type[Distiller]] = subclasses(Distiller)  # type: ignore[type-abstract]
    known = {name: cls for name, cls in every.items() if not inspect.isabstract(cls)}
    return {name: (inspect.getdoc(cls) or "").partition("\n")[0] for name, cls in sorted(known.items())}

"""Distillers of other projects."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points

from kdvit.distillers import Distiller

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
    known: dict[str, str] = {}
    classes: list[type[Distiller]] = [Distiller]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        if cls is not Distiller and not inspect.isabstract(cls):
            known[cls.__name__] = (inspect.getdoc(cls) or "").partition("\n")[0]
    return dict(sorted(known.items()))

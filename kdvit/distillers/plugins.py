"""Distillers of other projects."""

from __future__ import annotations

import inspect
import sys
from importlib.metadata import entry_points

from kdvit.distillers import Distiller
from kdvit.structures import subclasses

GROUP = "kdvit.distillers"


def load_plugins() -> None:
    """Imports every distiller that an installed package declares under the entry-point group `kdvit.distillers`.

    Once imported, its short class name is known to the command line. One that cannot be imported is warned of in a line
    and skipped: the command may have no need of it.
    """
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
            if not (inspect.isclass(loaded) and issubclass(loaded, Distiller)):
                raise TypeError(f"expected a subclass of Distiller, got {loaded!r}")
        except Exception as error:
            package = entry.dist.name if entry.dist else "an unknown package"
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(
                f"kdvit: warning: skipped the distiller {entry.name!r} of {package} ({entry.value}): {reason}",
                file=sys.stderr,
            )


def known_distillers() -> dict[str, str]:
    """Returns the short names of the imported distillers with the first line of their documentation."""
    known: dict[str, type[Distiller]] = subclasses(Distiller)  # type: ignore[type-abstract]
    return {name: (inspect.getdoc(cls) or "").partition("\n")[0] for name, cls in sorted(known.items())}

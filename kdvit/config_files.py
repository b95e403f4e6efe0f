"""The configs that come with kdvit, found by their short names wherever one works."""

from __future__ import annotations

from pathlib import Path

import kdvit


def packaged_configs() -> Path:
    """Returns the folder of the configs: inside an installed package, beside it in a checkout."""
    home = Path(kdvit.__file__).parent
    inside = home / "configs"
    return inside if inside.is_dir() else home.parent / "configs"


def find_configs(args: list[str]) -> list[str]:
    """Replaces ``--config NAME`` by the path of the config that kdvit brings, where no file NAME is at hand.

    Example:
        >>> find_configs(["fit", "--config", "configs/lift.yaml"])[-1].endswith("lift.yaml")
        True
    """
    found = list(args)
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-c") and equals:
            found[i] = f"{flag}={find_config(value)}"
        elif i > 0 and args[i - 1] in ("--config", "-c"):
            found[i] = find_config(arg)
    return found


def find_config(name: str) -> str:
    """Returns the path of a config that kdvit brings, where no file of that name is at hand; else the name itself."""
    packaged = packaged_configs() / name.removeprefix("configs/")
    return str(packaged) if not Path(name).exists() and packaged.is_file() else name

"""The configs that come with kdvit, found by their short names wherever one works, and YAML that cannot grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

JSONARGPARSE_YAML = get_loader("yaml")
MOST_VALUES = 100_000
"""Values of a config with its aliases written out."""


def packaged_configs() -> Path:
    """Returns the folder of the configs: inside an installed package, beside it in a checkout."""
    home = Path(__file__).parent.parent
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


def read_plain_values_alone() -> None:
    """Has jsonargparse load YAML by `load_yaml`."""
    set_loader("yaml", load_yaml, (yaml.YAMLError,))


def load_yaml(text: str) -> Any:
    """Loads YAML as jsonargparse does: plain values alone.

    Raises:
        yaml.YAMLError: If it is no YAML, names a Python object, or has aliases that write out to very many values, of which
            a few lines can make more than any memory holds.
    """
    if "*" in text:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None and _written_out(root, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases write out to more than {MOST_VALUES:,} values")
    return JSONARGPARSE_YAML(text)


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """Returns the number of values below a node; infinite, where it holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        value = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [part for child in value for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_written_out(child, known) for child in children)
    return known[id(node)]

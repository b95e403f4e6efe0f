"""What stands outside kdvit: found by import path, built with its own errors shown, and called only where it may be."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from functools import reduce
from importlib import import_module
from typing import Any

from torch import nn

from kdvit.errors import own_errors

IMPORTED: set[str] = set()
"""Packages that the user has named, whose classes and functions a student's file may call."""
WELL_KNOWN = ("torchvision", "transformers")
"""Packages that are imported where a student's file names one of their networks."""
BUILDERS = "torchvision.models"


def import_packages(names: Iterable[str]) -> None:
    """Imports packages or modules of the user's, so that the files of students may name what is in them.

    Raises:
        OwnError: If one cannot be imported.
    """
    for name in names:
        with own_errors(name):
            import_module(name)
        IMPORTED.add(name)


def class_path(kind: type) -> str:
    """Returns the name by which a config or a student's file finds a class: of kdvit's own ones the short one."""
    return kind.__name__ if kind.__module__.startswith("kdvit.") else f"{kind.__module__}.{kind.__qualname__}"


def find_object(path: str) -> Any:
    """Imports what an import path names: a class, a function, or a method of a class.

    Raises:
        ImportError: If there is no such module.
        AttributeError: If the module does not have it.

    Examples:
        >>> find_object("torch.nn.Linear.forward").__name__
        'forward'
    """
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            return reduce(getattr, parts[end:], import_module(name))
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there, and lacks another
    raise ModuleNotFoundError(f"there is no module of {path!r}; expected an import path, such as my_package.MyNet")


def find_trusted(path: str) -> Any:
    """Returns what the file of a student names, if a file may call it.

    That is any network (`torch.nn.Module`) of a package that is imported, or of torchvision or transformers; a config
    of transformers; a function of torchvision.models; and all of a package that the user has named in
    `import_packages`.

    Raises:
        ValueError: If it may not, or is not there.
    """
    known = path.split(".")[0] in WELL_KNOWN or path.rpartition(".")[0] in sys.modules
    with own_errors(path):
        found = find_object(path) if known else None
    home = f"{getattr(found, '__module__', '')}."
    network = inspect.isclass(found) and issubclass(found, nn.Module)
    config = home.startswith("transformers.") and hasattr(found, "to_diff_dict")
    if network or config or home.startswith(tuple(f"{each}." for each in (*IMPORTED, BUILDERS))):
        return found
    package = path.split(".")[0]
    raise ValueError(
        f"it needs {path}, which is not imported. If you trust it, add --import {package} to the command (in Python, "
        f"load_student(path, imports=[{package!r}]))."
    )


def built(value: Any) -> Any:
    """Returns a value in which every mapping of `class_path` and `init_args` has become the object that it names."""
    if isinstance(value, list):
        return [built(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value or not value.keys() <= {"class_path", "init_args"}:
        return {name: built(each) for name, each in value.items()}
    args = built(value.get("init_args") or {})
    with own_errors(value["class_path"]):
        return find_object(value["class_path"])(**args)


def class_paths(value: Any) -> list[str]:
    """Returns the import paths that `ModuleNetwork` would build, of its `init_args`."""
    if isinstance(value, list):
        return [path for each in value for path in class_paths(each)]
    if not isinstance(value, dict):
        return []
    own = [value[name] for name in ("module", "class_path") if isinstance(value.get(name), str)]
    return own + [path for each in value.values() for path in class_paths(each)]


def plain_arguments(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the arguments of a constructor's call by name, in plain types; None where they are not plain.

    Examples:
        >>> class Net:
        ...     def __init__(self, width, norm=nn.LayerNorm, **more): ...
        >>> plain_arguments(Net, (8,), {"norm": nn.LayerNorm, "grid": (2, 2)})
        {'width': 8, 'grid': [2, 2]}
    """
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        return None
    defaults = {each.name: each.default for each in parameters}
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    plain: dict[str, Any] | None = as_plain(
        {name: v for name, v in given.items() if v is not defaults.get(name, ...) or as_plain([v])}
    )
    return plain


def as_plain(value: Any) -> Any:
    """Returns a value as JSON has it: numbers, text, lists and mappings; None where it has not."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None

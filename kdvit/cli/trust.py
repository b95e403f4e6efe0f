"""What a config may not do: hand over code to be called, or have files written outside the run directory."""

from __future__ import annotations

import functools
import inspect
import os
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import register_type

from kdvit.errors import UserError

NO_CODE = (
    "a config names classes of the type that an argument expects, and hands over no functions and no other classes"
)
WRITERS = ("callbacks", "logger", "profiler", "strategy", "plugins")  # of the trainer
FOLDER = re.compile(r"(dir|directory|folder|path)s?(\[\d+\])*$")
LINK = re.compile(r"(uri|location)$")  # a folder or a server
SERVER = ("http://", "https://")
ADDRESS = re.compile(r"^[A-Za-z][\w+.-]*:/")
EXPANDED = re.compile(r"^~|\$[A-Za-z_{]")


def build_no_callables() -> None:
    """Sets jsonargparse so that a config's ``class_path`` builds a class of the type that its place expects, and no other.

    By default it builds any class where any value goes, as in `model_args`, and any class whose instances can be called
    where a callable goes, as in a callback's hooks; it reads configs from addresses of the internet, and only warns of
    the modules on its own list of those that run programs.
    """
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False, config_read_mode_fsspec_enabled=False, import_path_denylist=[]
    )
    register_type(Callable, _path_of_callable, _default_callable, Exception, lambda value, _: callable(value))


def refuse_code(config: Any) -> None:
    """Raises if a parsed config holds a function, or the path of one in place of a class.

    Raises:
        UserError: If it does. The functions that a class has as defaults of its arguments are its own.
    """
    for place, owner, value in _values(config, ""):
        if isinstance(value, Namespace) and isinstance(value.get("class_path"), str):
            if not inspect.isclass(_imported(value.class_path)):
                raise UserError(f"{place}: {value.class_path!r} is no class: {NO_CODE}.")
        elif _is_handed_over(value) and not _is_default(owner, value):
            raise UserError(f"{place}: got {_path_of_callable(value)!r}, but {NO_CODE}.")


def refuse_writing_elsewhere(config: Any) -> None:
    """Raises if a parsed config would have files written outside its ``trainer.default_root_dir``.

    Checked is all text that callbacks, loggers and the like are given, and not its use, which only they know, nor what they
    write of their own accord. A data module's folders are the data's, wherever they are.

    Raises:
        UserError: If a value leads elsewhere.
    """
    root = str(config.trainer.default_root_dir)
    if _is_address(root) or not root.isprintable():  # such as a line break, which would end a comment of a Slurm script
        raise UserError(f"trainer.default_root_dir: expected a folder of this machine, got {root!r}.")
    for name in WRITERS:
        for place, _, value in _values(config.trainer[name], f"trainer.{name}"):
            _refuse_elsewhere(place, value, root)
    for key in ("checkpoint", "last_checkpoint"):
        name = config[key].filename
        if name is not None and (Path(name).is_absolute() or ".." in Path(name).parts):
            raise UserError(f"{key}.filename: expected a name inside the run's checkpoints, got {name!r}.")
    for place, _, value in _values(config.model, "model"):
        if place.endswith(".cache_dir"):  # where timm downloads to
            _refuse_elsewhere(place, value, root)


def refuse_folder_of_config(config: Any, args: list[str]) -> None:
    """Raises if the folder that `kdvit cache` writes comes from a config and not from the command line.

    Raises:
        UserError: If it does.
    """
    out = config.get("out")
    given = [value for option, value in pairwise(["", *args]) if option == "--out"]
    given += [arg.removeprefix("--out=") for arg in args if arg.startswith("--out=")]
    if out is not None and out not in given:
        raise UserError(
            f"out: a config chooses no folder but its run directory, got {out!r}: give --out on the command line."
        )


def _refuse_elsewhere(place: str, value: Any, root: str) -> None:
    key = place.rpartition(".")[2]
    if isinstance(value, (str, PurePath)) and key != "class_path" and _leads_out(key, str(value), root):
        raise UserError(
            f"{place}: {str(value)!r} leads out of the run directory {root!r}, where all that a run writes goes (given, or a "
            f"default). Set it to a path in that directory, as seen from here, such as {str(Path(root) / key)!r}, leave it out, or choose "
            "another --trainer.default_root_dir."
        )


def _leads_out(key: str, text: str, root: str) -> bool:
    if ".." in PurePath(text).parts or EXPANDED.search(text):
        return True
    is_folder = bool(FOLDER.search(key)) and key != "sub_dir"  # which Lightning appends to the logger's folder
    if text.startswith(SERVER) and not is_folder:
        return False  # it is no file
    if ADDRESS.search(text) or (is_folder and _is_address(text)):
        return True
    is_path = is_folder or bool(LINK.search(key)) or PurePath(text).is_absolute()
    return is_path and not Path(text).resolve().is_relative_to(Path(root).resolve())


def _is_address(text: str) -> bool:
    """Returns whether a text is none of this machine's files for fsspec, by which Lightning opens them."""
    return bool(ADDRESS.search(text)) or "::" in text


def _values(value: Any, place: str, owner: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Yields the values of a config, each with its key and the class whose argument it is, if a config names that."""
    yield place, owner, value
    if isinstance(value, Namespace):
        value = vars(value)
        owner = _imported(value["class_path"]) if isinstance(value.get("class_path"), str) else owner
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _values(child, f"{place}.{name}" if place else str(name), owner)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for i, child in enumerate(value):
            yield from _values(child, f"{place}[{i}]", owner)


def _imported(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path) if "." in path else None
    except (ImportError, AttributeError, ValueError):
        return None


def _default_callable(value: Any) -> Any:
    """Returns the function or class of an import path, or of a ``class_path`` alone: how jsonargparse writes defaults down.

    Raises:
        ValueError: If it is anything else.
    """
    named = vars(value) if isinstance(value, Namespace) else value
    path = named["class_path"] if isinstance(named, dict) and list(named) == ["class_path"] else named
    found = _imported(path) if isinstance(path, str) else None
    if not callable(found):
        raise ValueError(NO_CODE)
    return functools.partial(found) if inspect.isclass(found) else found


def _path_of_callable(value: Any) -> Any:
    if not callable(value):
        raise ValueError(f"expected a callable, got {value!r}")
    if isinstance(value, functools.partial):
        return {"class_path": _path_of_callable(value.func)}
    named = value if hasattr(value, "__qualname__") else type(value)
    paths = [f"{named.__module__}.{name}" for name in (named.__name__, named.__qualname__)]  # torch.tanh is but the one
    return next((path for path in paths if _imported(path) is named), paths[1])


def _is_handed_over(value: Any) -> bool:
    return callable(value) and not inspect.isclass(value) and not isinstance(value, os.PathLike)


def _is_default(owner: Any, value: Any) -> bool:
    """Returns whether a callable is the default of an argument of a class."""
    if owner is None:
        return False
    parser = ArgumentParser()
    parser.add_class_arguments(owner, fail_untyped=False)
    defaults = (default for _, _, default in _values(parser.get_defaults(), "") if callable(default))
    return _path_of_callable(value) in map(_path_of_callable, defaults)

"""One clear message for a user's mistake."""

from __future__ import annotations

import difflib
import errno
import inspect
import re
from collections.abc import Iterable
from importlib import import_module

import lightning.pytorch as pl
import torch.distributed
from jsonargparse import ArgumentError

from kdvit.data.reading import ImageError
from kdvit.distillers import Distiller
from kdvit.errors import UserError
from kdvit.models import Network
from kdvit.structures import subclasses
from kdvit.training.module import DistillationModule

CLASSES: dict[str, type] = {
    "model.distillers": Distiller,
    "model.student": Network,
    "model.teacher": Network,
    "data": pl.LightningDataModule,
}
NOT_SAID = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
LONGEST = 600  # characters of a message
GLOO = "gloo/transport"  # in its errors, which are RuntimeErrors


EXPLAINED = (UserError, ArgumentError)


def explain(error: Exception) -> str | None:
    """Returns the message for a user's mistake, and None for any other error.

    jsonargparse's report of every type that a value was tried against is cut down to the one that matters, and a
    misspelt name gets its nearest match.
    """
    if isinstance(error, OSError) and error.errno in FULL:
        return (
            f"cannot write {str(error.filename or 'a file')!r}: {error.strerror}. What was there before is left as it was. Make "
            "room and give the same command again: a run goes on from its last checkpoint."
        )
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and GLOO in str(error)):
        said = " ".join(str(error).split())[:300]
        return f"the connection to another process of this run is lost: see what has ended that one. ({said})"
    if isinstance(error, ImageError):
        return f"{error} Then give the same command again: a run goes on from its last checkpoint."
    if not isinstance(error, EXPLAINED):
        return None
    text = _named(_condensed(str(error)))
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 4 :]}"


def unforeseen(what: str, error: Exception) -> str:
    """Returns the message for a config that cannot be read or built for a reason that no check has foreseen."""
    return f"The config cannot be {what}. {type(error).__name__}: {error} (KDVIT_TRACEBACK=1 shows where.)"


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean X?" for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _condensed(text: str) -> str:
    said = []
    for line in text.splitlines():
        line = line.strip().removeprefix("- ")
        if line.startswith("Given value:"):
            value = line.removeprefix("Given value: ")
            said += [f"(got {value!r})"] if re.fullmatch(r"[\w./:+-]{1,50}", value) else []
            break
        if line.startswith("Given value type"):
            continue
        if line and not line.startswith(NOT_SAID):
            said.append(line)
    condensed = " ".join(said)
    condensed = re.sub(r'Parser key "([^"]+)":', r"\1:", condensed)
    condensed = re.sub(r" Add the import path to import_path_allowlist.*? to allow it\.", "", condensed)
    condensed = re.sub(r"Problem with given class_path '([^']+)':", r"\1:", condensed)
    condensed = re.sub(r"Expected a (?:<class '(\w+)'>|typing\.(\w+\[.*?\]))\. Got value: (.*)", _expected, condensed)
    condensed = re.sub(r"Expected a <class '(\w+)'>(?= |$)", r"expected \1", condensed)
    return re.sub(r"Expected a typing\.Literal\[([^\]]*)\](?= |$)", r"or one of \1", condensed)


def _expected(match: re.Match[str]) -> str:
    kind, special, value = match.groups()
    return f"expected {kind or special}, got {value!r}."


def _named(text: str) -> str:
    key = text.partition(":")[0]
    if match := re.search(r"Expected a dot import path string: (\S+)", text):
        known: dict[str, type] = subclasses(CLASSES.get(key, object)) if key in CLASSES else {}
        listed = f" Known: {', '.join(sorted(known))}." if known else ""
        return (
            f"{key}: there is no class {match[1]!r}.{nearest(match[1], known)}{listed} A class of your own needs its import "
            "path, such as my_package.MyClass."
        )
    if match := re.match(
        r"([\w.]+): (Not a valid subclass of .*Subclass types expect|.*(is not iterable|object has no attribute '\w+'"
        r"|unhashable type: '\w+'|must be a mapping, not \w+)$)",
        text,
    ):
        return f"{match[1]}: expected `class_path`, the name of a class, and below it `init_args`, a mapping of its arguments."
    if "kdvit.Distiller is abstract" in text:
        return f"{key}: one of them has no class_path. (A name that the config does not have makes a new distiller.)"
    if match := re.search(r"([\w.]+): Option '([^']+)' is not accepted", text):
        known_options = _parameters(match[1])
        return f"{text}.{nearest(match[2], known_options)} It takes: {', '.join(known_options)}."
    if match := re.search(r"does not accept option '([^']+)'", text):
        group, _, option = match[1].partition(".")
        owners: dict[str, type] = {"model": DistillationModule, "trainer": pl.Trainer}
        known_options = list(inspect.signature(owners[group]).parameters) if group in owners else []
        return f"there is no option {match[1]!r}.{nearest(option, known_options)} `kdvit fit --help` lists all."
    return text


def _parameters(class_path: str) -> list[str]:
    """Returns the names of a constructor's arguments, those behind **kwargs included."""
    module, _, name = class_path.rpartition(".")
    names: dict[str, None] = {}
    for cls in getattr(import_module(module), name).__mro__:
        parameters = inspect.signature(cls).parameters.values() if "__init__" in vars(cls) else ()
        names |= {each.name: None for each in parameters if each.kind is not each.VAR_KEYWORD}
        if parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return list(names)

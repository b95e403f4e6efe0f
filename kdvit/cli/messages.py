"""One clear message for a user's mistake."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from traceback import extract_tb
from typing import Any, TypeVar

from jsonargparse import ArgumentError

from kdvit.cli.config_files import ENDINGS
from kdvit.errors import UserError, nearest, own_errors

T = TypeVar("T")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
LONGEST = 600  # characters of a message
OWN = r"(?m)^[\s-]*(\S+ raises \w+: .*)"  # of an OwnError, wherever jsonargparse has put it
GLOO = "gloo/transport"  # in its errors, which are RuntimeErrors
TAKEN = "EADDRINUSE"


LIGHTNING = "lightning.pytorch.utilities.rank_zero"
"""The logger of Lightning's lines."""


@contextmanager
def unsaid(*starts: str) -> Iterator[None]:
    """Leaves out those of Lightning's lines and warnings inside that begin so."""

    def is_said(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(starts)

    logger = logging.getLogger(LIGHTNING)
    logger.addFilter(is_said)
    try:
        with warnings.catch_warnings():
            for each in starts:
                warnings.filterwarnings("ignore", re.escape(each))
            yield
    finally:
        logger.removeFilter(is_said)


def explain(error: Exception) -> str | None:
    """Returns the message for a user's mistake, and None for any other error."""
    if isinstance(error, OSError) and error.errno in FULL:
        return (
            f"cannot write {str(error.filename or 'a file')!r}: {error.strerror}. What was there before is left as it "
            "was. Make room and give the same command again: a run goes on from its last checkpoint."
        )
    if text := _of_processes(error):
        return text
    if not isinstance(error, (ArgumentError, UserError)):
        return None
    is_rephrased = isinstance(error, UserError) and isinstance(
        error.__cause__, ArgumentError
    )  # by the UserError that was made of it
    said = str(error) if is_rephrased else rephrase(str(error))
    text = f"{said} {getattr(error, 'then', '')}".strip()
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 4 :]}"


def _of_processes(error: Exception) -> str | None:
    """Returns the message for what has become of another process of the run, or of a loader's worker."""
    said, torch = " ".join(str(error).split())[:300], sys.modules.get("torch")
    lost = torch is not None and isinstance(error, torch.distributed.DistError)
    if lost and TAKEN in said:
        return (
            f"MASTER_PORT {os.environ.get('MASTER_PORT')} is taken on this machine, perhaps by another run: unset it, "
            "and a free one is found, or set another one."
        )
    if lost or (isinstance(error, RuntimeError) and GLOO in said):
        return f"the connection to another process of this run is lost: see what has ended that one. ({said})"
    receiving = any(frame.name == "_try_get_data" for frame in extract_tb(error.__traceback__))
    if (
        "DataLoader worker (pid" in said
        or "</torch_" in str(error)
        or (receiving and isinstance(error, (OSError, EOFError)))
    ):
        return (
            "a loader's worker has ended, as it does where memory or shared memory (/dev/shm) is short: lower "
            "--data.init_args.num_workers (0 needs no shared memory), or give more (docker run --shm-size=8g). "
            f"({str(error).strip().splitlines()[-1]})"
        )
    return None


@contextmanager
def unforeseen(what: str) -> Iterator[None]:
    """Turns any error that no check has foreseen into a UserError: a config that has led to it is at fault, too.

    Args:
        what: What has failed, as a sentence.
    """
    try:
        yield
    except Exception as error:
        if explain(error) is not None:
            raise
        raise UserError(f"{what} {type(error).__name__}: {error} (KDVIT_TRACEBACK=1 shows where.)") from error


@contextmanager
def options_known(command: str, known: Iterable[str]) -> Iterator[None]:
    """Names the nearest option of a command where one is unknown.

    Args:
        command: Its name.
        known: Its options, as they are typed.
    """
    try:
        yield
    except ArgumentError as error:
        match = re.search(r"unrecognized arguments: (\S+)", str(error))
        if match is None:
            raise
        word = match[1].partition("=")[0]
        if not word.startswith("-"):
            config = f"Did you mean --config {word}?" if word.endswith(ENDINGS) else "What needs none comes first."
            raise UserError(f"{word!r} belongs to no option. {config}") from error
        raise no_option(command, word, known) from error


def no_option(command: str, word: str, known: Iterable[str]) -> UserError:
    """Returns the error that names the nearest option of a command for one that it does not have."""
    return UserError(f"there is no option {word!r}.{nearest(word, known)} `kdvit {command} --help` lists them.")


def with_own_errors(class_type: type[T], *args: Any, **kwargs: Any) -> T:
    """Builds a class of a config; an error inside a class that is neither kdvit's nor Lightning's says where it is."""
    if class_type.__module__.partition(".")[0] in ("kdvit", "lightning"):
        return class_type(*args, **kwargs)
    with own_errors(f"{class_type.__module__}.{class_type.__qualname__}"):
        return class_type(*args, **kwargs)


# jsonargparse lists every type that it has tried: what is left out of that, and what is shortened

LEFT_OUT = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value type")
SHORTER = (
    (r'Parser key "([^"]+)":', r"\1:"),
    (r"Problem with given class_path '([^']+)':", r"\1:"),
    (r" Add the import path to import_path_allowlist.*? to allow it\.", ""),
    (r"Expected a (?:<class '|typing\.)(\w+(?:\[.*?\])?)'?>?\. Got value: (.*)", r"expected \1, got '\2'."),
    (r"Expected a <class '(\w+)'>(?= |$)", r"expected \1"),
    (r"Not of type \w+: (\S+) does not conform to restriction v>0$", r"must be above 0, got \1."),
    (r"Not of type \w+: (\S+) does not conform to restriction v>=0$", r"must be 0 or more, got \1."),
    (r"Not of type \w+: (?:\S+ )?does not conform to restriction v", "expected a number "),
    (r"Expected a typing\.Literal\[([^\]]*)\](?= |$)", r"or one of \1"),
    (r"expected (\w+) expected (\w+)(?= \(|$)", r"expected \1 or \2"),
    (r": or one of ", ": expected one of "),
    (r"Expected a path but .* either not accessible or invalid ", ""),
    (
        r"expected float Expected a dot import path string: \S+",
        "expected a number, or a schedule of start, end, epochs and shape",
    ),
    (r"expected float (?:kdvit\.distillers\.WeightSchedule: (?!Option)|(?=weight: |kdvit\.))", ""),
)


def rephrase(text: str) -> str:
    """Returns jsonargparse's report of a mistake as one line that says what to do."""
    if own := re.search(OWN, text):
        return f"{own[1]} (KDVIT_TRACEBACK=1 shows where.)"
    kept = []
    for line in map(str.strip, text.splitlines()):
        line = line.removeprefix("- ")
        if line.startswith("Given value: "):
            value = line.removeprefix("Given value: ")
            kept += [f"(got {value!r})"] if re.fullmatch(r"[\w./:+-]{1,50}", value) else []
            break
        if line and not line.startswith(LEFT_OUT):
            kept.append(line)
    short = " ".join(kept)
    for pattern, replacement in SHORTER:
        short = re.sub(pattern, replacement, short)
    for pattern, answer in ANSWERS.items():
        if match := re.search(pattern, short):
            return answer(short, match)
    return short


def _unknown_class(text: str, match: re.Match[str]) -> str:
    from lightning.pytorch import LightningDataModule

    from kdvit.distillers import Distiller
    from kdvit.models import Network
    from kdvit.structures import subclasses

    key = text.partition(":")[0]
    networks: dict[str, type] = dict.fromkeys(("model.student", "model.teacher", "model.teachers"), Network)
    kind = {**networks, "model.distillers": Distiller, "data": LightningDataModule}.get(key)
    known: dict[str, type] = subclasses(kind) if kind else {}
    listed = f" Known: {', '.join(sorted(known))}." if known else ""
    return (
        f"{key}: there is no class {match[1]!r}.{nearest(match[1], known)}{listed} A class of your own needs its "
        "import path, such as my_package.MyClass."
    )


def _unknown_argument(text: str, match: re.Match[str]) -> str:
    known = arguments(match[1])
    return f"{text}.{nearest(match[2], known)} It takes: {', '.join(known)}."


def _unknown_option(text: str, match: re.Match[str]) -> str:
    owners = {"model": "kdvit.training.DistillationModule", "trainer": "lightning.pytorch.Trainer"}
    group, _, option = match[1].partition(".")
    known = arguments(owners[group]) if group in owners else []
    return f"there is no option {match[1]!r}.{nearest(option, known)} `kdvit fit --help all` lists all."


ANSWERS: dict[str, Callable[[str, re.Match[str]], str]] = {
    r"the following arguments are required: .*\b(?:model\.student|data)\b": lambda text, _: (
        f"{text}. Give a config that has them: --config NAME, such as --config demo/plain.yaml."
    ),
    r"Expected a dot import path string: (\S+)": _unknown_class,
    r"^([\w.]+): (Not a valid subclass of .*Subclass types expect|.*(?:is not iterable|object has no attribute '\w+'"
    r"|unhashable type: '\w+'|must be a mapping, not \w+)$)": lambda _, match: (
        f"{match[1]}: expected `class_path`, the name of a class, and below it `init_args`, a mapping of its arguments."
    ),
    r"kdvit\.Distiller is abstract": lambda text, _: (
        f"{text.partition(':')[0]}: one of them has no class_path. (A name that the config does not have makes a new "
        "distiller.)"
    ),
    r"([\w.]+): Option '([^']+)' is not accepted": _unknown_argument,
    r"does not accept option '([^']+)'": _unknown_option,
}


def arguments(class_path: str) -> list[str]:
    """Returns the names of a constructor's arguments, those behind **kwargs included."""
    module, _, name = class_path.rpartition(".")
    names: dict[str, None] = {}
    for cls in getattr(import_module(module), name).__mro__:
        parameters = inspect.signature(cls).parameters.values() if "__init__" in vars(cls) else ()
        names |= {each.name: None for each in parameters if each.kind is not each.VAR_KEYWORD}
        if parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return list(names)

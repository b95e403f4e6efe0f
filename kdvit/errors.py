"""The errors that a user is shown in one line, without a traceback: one family, so that nothing has to list them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar


class UserError(Exception):
    """A mistake in a config, on the command line or in the data. The message says what to do.

    Attributes:
        then: What to do after that, at the end of a message of the command line.
    """

    then: ClassVar[str] = ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean X?" for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def some(names: Iterable[str]) -> str:
    """Returns the first four of many names, and how many more there are.

    Examples:
        >>> some(["a", "b"]), some(["a", "b", "c", "d", "e"])
        ('a, b', 'a, b, c, d and 1 more')
    """
    names = list(names)
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


class WorkerError(UserError):
    """An error that a loader's worker may raise; its text leaves out the traceback that torch puts before it."""

    def __str__(self) -> str:
        """Returns the message alone."""
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class OwnError(UserError, ValueError):
    """An error inside a class or package of the user's; its message ends with ``raises TYPE: TEXT``."""


@contextmanager
def own_errors(what: str) -> Iterator[None]:
    """Turns any error into an OwnError that says whose it is.

    Args:
        what: What raises it, such as the import path of a class.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise OwnError(f"{what} raises {type(error).__name__}: {text}") from error


@contextmanager
def shown(kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError), prefix: str = "") -> Iterator[None]:
    """Turns errors of the library into a UserError of the same message.

    Args:
        kinds: Those that a user's input can lead to; errors of the arguments and of files.
        prefix: What stands before the message, such as the name of the file.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{prefix}{error}") from error

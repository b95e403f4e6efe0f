"""A function as a command: its signature gives the arguments, its docstring the help."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from kdvit.cli.messages import options_known
from kdvit.errors import UserError

PASSED = ("rest", "typed")
"""Parameters that are no options: the words that the function does not know, and all words."""


def call(function: Callable[..., Any], name: str, args: list[str]) -> Any:
    """Calls a function with the arguments of a command line.

    A parameter without a default is a positional argument, or a required option where it is keyword-only. A list takes
    several words (``--layers 3 0.5 lift``), a bool may stand alone. Words that the function does not know go to its
    parameter `rest`, where it has one; its parameter `typed` receives all words.

    Args:
        function: Its docstring has a description, ``Args`` and ``Example``.
        name: Name of the command.
        args: The words behind the name.

    Raises:
        ArgumentError: If a word is unknown, or a value has another type.
    """
    parameters, parser = inspect.signature(function).parameters, parser_of(function, name)
    known = {key: kind for key, kind in get_type_hints(function).items() if key in parameters and key not in PASSED}
    first = next(iter(parameters.values()), None)
    alone = first.name if first and first.kind is first.POSITIONAL_OR_KEYWORD and _item(known[first.name]) else None
    own, rest = joined(args, known, alone, "rest" in parameters)
    with options_known(name, parser._option_string_actions):
        given = parser.instantiate(parser.parse_args(own))
    passed = {"rest": rest, "typed": args}
    return function(**given, **{key: passed[key] for key in PASSED if key in parameters})


def parser_of(function: Callable[..., Any], name: str) -> ArgumentParser:
    """Returns the parser of a function as a command; see `call`."""
    text, _, example = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples:\n")
    parser = ArgumentParser(
        prog=f"kdvit {name}",
        usage=usage(function, name),
        description=text.partition("\n\nArgs:")[0],
        epilog=f"example: {example.strip()}",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip={*PASSED})
    return parser


def without_imports(args: list[str]) -> list[str]:
    """Imports what every ``--import PACKAGE`` names, and returns the other words.

    Raises:
        UserError: If a package cannot be imported.
    """
    rest: list[str] = []
    names: list[str] = []
    words = iter(args)
    for word in words:
        if word == "--import":
            names.append(next(words, ""))
        elif word.startswith("--import="):
            names.append(word.partition("=")[2])
        else:
            rest.append(word)
    if "" in names:
        raise UserError("--import needs the name of a package or module, such as my_package.")
    if names:
        from kdvit.models.own import import_packages

        import_packages(names)
    return rest


def usage(function: Callable[..., Any], name: str) -> str:
    """Returns the usage line of a command: what it needs, in the order of the signature.

    Examples:
        >>> def export(runs: list[str], *, out: str, weights: str = "raw") -> None: ...
        >>> usage(export, "export")
        'kdvit export RUNS --out OUT [options]'
    """
    words = ["kdvit", name]
    parameters = inspect.signature(function).parameters
    for key, each in parameters.items():
        if each.default is each.empty and key not in PASSED:
            words.append(f"--{key} {key.upper()}" if each.kind is each.KEYWORD_ONLY else key.upper())
    return " ".join([*words, "[options]", *(["[options of kdvit fit]"] if "rest" in parameters else [])])


def joined(
    args: list[str], known: dict[str, Any], alone: str | None = None, has_rest: bool = False
) -> tuple[list[str], list[str]]:
    """Joins the words of each list into one, as jsonargparse takes them, and separates known words from others.

    Args:
        args: The words.
        known: Types of the parameters, by name.
        alone: The list that takes the words that stand alone.
        has_rest: Whether unknown words are somebody else's; if not, they are left among the known ones.

    Returns:
        The known words, and the others.

    Examples:
        >>> known = {"runs": list[str], "seeds": list[int], "dry_run": bool}
        >>> joined(["a", "b", "--seeds", "1", "2", "--dry-run"], known, alone="runs")
        (['--dry_run=true', '["a", "b"]', '--seeds=[1, 2]'], [])
        >>> joined(["--lr", "3", "--seeds", "2"], known, has_rest=True)
        (['--seeds=[2]'], ['--lr', '3'])
    """
    own: list[str] = []
    rest: list[str] = []
    lists: dict[str, list[str]] = {}
    words = list(args)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        kind = known.get(name.partition(".")[0])
        if word in ("-h", "--help"):
            own.append("--help")
        elif kind is None and alone and not word.startswith("-"):
            lists.setdefault(alone, []).append(word)
        elif kind is None:
            (rest if has_rest else own).append(word)
        elif _item(kind) and name in known:
            lists.setdefault(name, []).extend(_split(value) if equals else _values(words, known))
        elif equals or (kind is bool and not (words and words[0].lower() in ("true", "false"))):
            own.append(f"--{name}={value if equals else 'true'}")
        else:
            own += [f"--{name}", *words[:1]]
            words = words[1:]
    for name, values in lists.items():
        if not values:
            raise UserError(f"--{name} needs at least one value.")
        items = json.dumps(values if _item(known[name]) is str else [_value(each) for each in values])
        own.append(items if name == alone else f"--{name}={items}")
    return own, rest


def _values(words: list[str], known: dict[str, Any]) -> list[str]:
    """Takes the words of a list from the front, up to the next option; the first may look like one of sbatch's."""
    taken: list[str] = []
    while words and words[0] != "-h":
        word = words[0]
        if word.startswith("--") and (taken or word[2:].partition("=")[0].replace("-", "_") in {*known, "help"}):
            break
        taken.append(words.pop(0))
    return taken


def _split(text: str) -> list[str]:
    """Returns the items of a list in brackets, or a word as it is."""
    return [each.strip() for each in text[1:-1].split(",")] if text[:1] + text[-1:] == "[]" else [text]


def _value(word: str) -> int | float | str:
    """Returns the number that a word is, or the word."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


def _item(kind: Any) -> Any:
    """Returns the type of a list's items; None where the type is no list."""
    kinds = [kind, *get_args(kind)]
    return next((get_args(each)[0] for each in kinds if get_origin(each) is list), None)

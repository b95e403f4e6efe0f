"""A function as a command: its signature gives the arguments, its docstring the help."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Container
from typing import Any, get_args, get_origin, get_type_hints

from docstring_parser import parse
from jsonargparse import ArgumentParser

from kdvit.cli.messages import no_option, options_known
from kdvit.errors import UserError

PASSED = ("rest", "typed")
"""Parameters that are no options: the words that the function does not know, and all words."""


def call(function: Callable[..., Any], name: str, args: list[str]) -> Any:
    """Calls a function with the arguments of a command line.

    A parameter without a default is a positional argument, or a required option where it is keyword-only. A list takes
    several words (``--seeds 0 1``, or ``--seeds 0 --seeds 1``), a bool may stand alone. Options that the function does
    not know go with their values to its parameter `rest`, where it has one; its parameter `typed` receives all words.

    Args:
        function: Its docstring has a description, ``Args`` and ``Example``.
        name: Name of the command.
        args: The words behind the name.

    Raises:
        UserError: If an option is unknown.
        ArgumentError: If a value has another type.
    """
    parameters, parser = inspect.signature(function).parameters, parser_of(function, name)
    options = parser._option_string_actions
    own, rest = known_words(args, options) if "rest" in parameters else (args, [])
    for word in (each.partition("=")[0] for each in args if each.startswith("--")):
        hyphened = rest and word.replace("-", "_").replace("__", "--", 1) in options
        dotted = not rest and "." in word  # which jsonargparse takes for what stands before the dot
        if word not in options and (hyphened or dotted):
            raise no_option(name, word, options)
    typed = [word.partition("=")[0] for word in args]
    for option, action in options.items():
        if action.nargs == "+" and not isinstance(action, argparse._ExtendAction) and typed.count(option) > 1:
            raise UserError(f"{option} is given twice. Give all its values behind one: {option} A B.")
    with options_known(name, options):
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
    kinds, parameters = get_type_hints(function), inspect.signature(function).parameters
    told = {each.arg_name: each.description for each in parse(text).params}
    for key, each in parameters.items():
        item = _item(kinds[key])
        if key in PASSED:
            continue
        if item is None and kinds[key] is not bool:
            parser.add_function_arguments(
                function, as_group=False, as_positional=True, skip={other for other in parameters if other != key}
            )
            continue
        words = {"type": bool, "nargs": "?", "const": True} if item is None else {"type": item, "nargs": "+"}
        if isinstance(item, type) and not each.default:  # what is given twice adds up: --sbatch=--a --sbatch=--b
            words["action"] = "extend"
        if each.default is each.empty:
            parser.add_argument(key, **words, help=told[key])
        else:
            parser.add_argument(f"--{key}", **words, help=told[key], default=each.default)
    return parser


def known_words(args: list[str], options: Container[str]) -> tuple[list[str], list[str]]:
    """Separates a command's own options, each with the words behind it, from others.

    Examples:
        >>> known_words(["--lr", "3", "--seeds", "1", "2", "--gpus=4"], {"--seeds", "--gpus"})
        (['--seeds', '1', '2', '--gpus=4'], ['--lr', '3'])
    """
    own: list[str] = []
    rest: list[str] = []
    taken = own
    for word in args:
        if word.startswith("-"):
            taken = own if word.partition("=")[0] in options else rest
        taken.append(word)
    return own, rest


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


def _item(kind: Any) -> Any:
    """Returns the type of a list's items; None where the type is no list."""
    kinds = [kind, *get_args(kind)]
    return next((get_args(each)[0] for each in kinds if get_origin(each) is list), None)

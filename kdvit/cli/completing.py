"""The completion of a shell: a script that knows all commands, options and values, and starts no Python."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any

from kdvit.cli.config_files import packaged_configs
from kdvit.cli.fit import SWITCHED
from kdvit.cli.help import SUMMARIES
from kdvit.cli.messages import arguments
from kdvit.cli.parsed import OptionsCLI
from kdvit.cli.parsing import parser_of
from kdvit.data import ImageDataModule
from kdvit.data.in_memory import InMemoryData
from kdvit.data.listed import ListedImages
from kdvit.models import Network, TimmNetwork, TimmTeacher
from kdvit.structures import subclasses

INIT_ARGS = {
    "--data.init_args": "kdvit.data.ImageFolder",
    "--model.student.init_args": "kdvit.models.LiftViT",
    "--model.teacher.init_args": "kdvit.models.TimmTeacher",
    **{f"--callbacks.{key}": f"kdvit.callbacks.{callback.__name__}" for key, callback in SWITCHED.items()},
}
"""Options of a Trainer's commands whose arguments are listed, and of which class."""
KINDS = {
    "--trainer.accelerator": ("auto", "cpu", "gpu"),
    "--trainer.precision": ("32-true", "16-mixed", "bf16-mixed"),
    "--ckpt_path": ("best", "last"),
}
"""Values of options whose type does not list them."""
SCRIPT = """\
_kdvit() {
    local typed="${COMP_WORDS[COMP_CWORD]}" option="${COMP_WORDS[COMP_CWORD-1]}" known=""
    if [ "$typed" = "=" ]; then
        typed=""
    elif [ "$option" = "=" ]; then
        option="${COMP_WORDS[COMP_CWORD-2]}"
    fi
    if [ "$COMP_CWORD" = 1 ]; then
        known="%(commands)s"
    else
        case "${COMP_WORDS[1]} $option" in
%(values)s
        esac
        case "$typed" in -*)
            case "${COMP_WORDS[1]}" in
%(options)s
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$known" -- "$typed"))
    case "$option" in -c|--config|--ckpt_path)
        local IFS=$'\\n'
        COMPREPLY+=($(compgen -f -- "$typed"))
        compopt -o filenames 2>/dev/null ;;
    esac
}
complete -o default -F _kdvit kdvit"""
"""For bash, whose functions zsh takes, too. Without a known word that fits, both complete the names of files."""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str, others: Mapping[str, Callable[..., Any]]) -> str:
    """Returns the script of a shell.

    Args:
        shell: bash or zsh.
        others: The commands that are no Trainer's, by name.
    """
    actions = {name: [*OptionsCLI(name, []).options] for name in SUMMARIES}
    of_a_trainer = [*SUMMARIES, *(name for name, each in others.items() if "rest" in signature(each).parameters)]
    for name, function in others.items():
        actions[name] = parser_of(function, name)._actions + (actions["fit"] if name in of_a_trainer else [])
    brought = [file.relative_to(packaged_configs()).as_posix() for file in sorted(packaged_configs().rglob("*.yaml"))]
    networks = {*subclasses(Network)} - {TimmNetwork.__name__}
    kinds = {
        **KINDS,
        "--config": brought,
        "-c": brought,
        "--data": sorted({*subclasses(ImageDataModule)} - {ListedImages.__name__, InMemoryData.__name__}),
        "--model.student": sorted(networks - {TimmTeacher.__name__}),
        "--model.teacher": sorted(networks),
    }
    options, values = "", dict[str, list[str]]()
    for command, found in actions.items():
        listed = {word for each in found if each.help != SUPPRESS for word in each.option_strings if word[-1] != "+"}
        if command in of_a_trainer:
            listed |= {f"{key}.{name}" for key, path in INIT_ARGS.items() for name in arguments(path)}
        options += f'                {command}) known="{" ".join(sorted(listed))}" ;;\n'
        for each in found:
            for word in each.option_strings or [command]:  # the word before the first argument is the command
                if known := kinds.get(word) or _choices(each):
                    values.setdefault(" ".join(known), []).append(f'"{command} {word}"')
    cases = (f'            {"|".join(words)}) known="{known}" ;;' for known, words in values.items())
    parts = {"commands": _words(actions), "options": options.rstrip(), "values": "\n".join(cases)}
    return (ZSH if shell == "zsh" else "") + SCRIPT % parts


def _words(commands: Iterable[str]) -> str:
    return " ".join([*sorted(commands), "--help", "--version"])


def _choices(action: Action) -> list[str]:
    """Returns the values that jsonargparse shows of an option, as in {true,false}."""
    match = re.fullmatch(r"\{(.+)\}", str(action.metavar))
    return match[1].split(",") if match else []

"""The command `kdvit`: which command is meant, and what a mistake is answered with. Light until a command runs."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

from kdvit.cli.commands.analyze import analyze
from kdvit.cli.commands.benchmark import benchmark
from kdvit.cli.commands.compare import compare
from kdvit.cli.commands.distillers import distillers
from kdvit.cli.commands.export import export
from kdvit.cli.commands.import_released import import_released
from kdvit.cli.commands.init import init
from kdvit.cli.commands.probe import probe
from kdvit.cli.commands.slurm import slurm
from kdvit.cli.config_files import find_configs
from kdvit.cli.help import SUMMARIES, asked_for, short_help
from kdvit.cli.messages import explain, unsaid
from kdvit.cli.parsing import call, without_imports
from kdvit.errors import UserError, nearest
from kdvit.runtime.orphans import end_with_parent, let_the_first_tell
from kdvit.tables import text_table


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print the script by which a shell completes commands, options and values, at once and without Python.

    For this shell: source <(kdvit completion bash). For all: write it into
    ~/.local/share/bash-completion/completions/kdvit, or load it from ~/.zshrc; it takes some seconds to make. Make it
    anew after an update.

    Args:
        shell: Which.

    Examples:
        kdvit completion bash
    """
    from kdvit.cli.completing import script

    print(script(shell, OTHERS))


OTHERS: dict[str, Callable[..., Any]] = {
    "analyze": analyze,
    "benchmark": benchmark,
    "compare": compare,
    "completion": completion,
    "distillers": distillers,
    "export": export,
    "import": import_released,
    "init": init,
    "probe": probe,
    "slurm": slurm,
}
NOISE = (
    "The `srun` command is available",  # with Slurm installed, on every run outside it
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own call
    "Checkpoint directory .* exists and is not empty",  # of every run that goes on
    "Experiment logs directory .* exists and is not empty",  # of every run, and untrue of one that goes on
    "It is recommended to use `self.log\\('(geometry/|val/(knn|linear)_)",  # which all processes have alike
    "FSDP2-wrapped module .* returned a view tensor",  # a feature map, which no distiller edits in place
    "Found .* module\\(s\\) in eval mode at the start of training",  # those that model.freeze keeps there
    "LightningCLI's args parameter is intended",  # the arguments are those of the process, with config names resolved
)


UNSAID = (
    *("💡 Tip:", "TPU available:"),  # of Lightning's own lines: advertisements, and what concerns nobody
    *("Restoring states from", "Restored all states from", "Loaded model weights from"),  # `find_start` has said it
)


def main(args: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Arguments after the program's name; by default those of the process.

    Raises:
        SystemExit: With status 2 and one clear message, if the user has made a mistake. (With the environment variable
            KDVIT_TRACEBACK set, the error itself.)
    """
    given = sys.argv[1:] if args is None else args
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    end_with_parent()
    if "" not in sys.path:
        sys.path.append("")  # the current folder, last: classes of one's own may be in a file there
    explanation = ""
    try:
        with unsaid(*UNSAID):
            run(given)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough: `kdvit check --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        explanation = explain(error) or ""
        if not explanation or os.environ.get("KDVIT_TRACEBACK"):
            raise
    finally:
        if "kdvit.data.workers" in sys.modules:  # else there were no collectives
            from kdvit.data.workers import let_collectives_end

            let_collectives_end()
    if explanation:  # the error and its frames are gone, and with them the loaders and their workers
        let_the_first_tell()
        print(f"kdvit: error: {explanation}", file=sys.stderr)
        raise SystemExit(2)


def run(args: list[str]) -> None:
    """Runs the command that the first argument names.

    Raises:
        UserError: If there is no such command.
    """
    command, rest = (args[0], args[1:]) if args else ("--help", [])
    if command != "slurm":  # whose job imports them
        rest = without_imports(rest)
    if command in ("-h", "--help"):
        print(overview())
    elif command == "--version":
        print(f"kdvit {version('kdvit')}")
    elif command in OTHERS:
        call(OTHERS[command], command, rest)
    elif command in SUMMARIES:
        topic = asked_for(rest)
        if topic == "":
            print(short_help(command))
            raise SystemExit(0)
        configured = [] if topic else find_configs(rest)  # before the imports, which take seconds
        run_trainer, show_help = _trainer_commands()
        if topic:
            show_help(command, topic)
        run_trainer(command, configured)
    else:
        known = [*SUMMARIES, *OTHERS]
        raise UserError(f"there is no command {command!r}.{nearest(command, known)} Commands: {', '.join(known)}.")


@cache
def _trainer_commands() -> tuple[Callable[[str, list[str]], Any], Callable[[str, str], Any]]:
    """Imports the commands of a Trainer and their help.

    What an import makes stays. To look through it for garbage, again and again, takes a fifth of the time.
    """
    gc.disable()
    from kdvit.cli.fit import KdvitCLI
    from kdvit.cli.parsed import HelpCLI

    gc.freeze()
    gc.enable()
    return KdvitCLI, HelpCLI


def overview() -> str:
    """Returns the help of the program: every command with a line on what it does."""
    summaries = {**SUMMARIES, **{name: (each.__doc__ or "").split("\n")[0] for name, each in OTHERS.items()}}
    table = text_table((), [(f"  {name}", summary) for name, summary in summaries.items()], left=2)
    return (
        "usage: kdvit COMMAND [options]\n\nDistill vision transformers.\n\ncommands:\n"
        f"{table}\n\nEvery command takes --import PACKAGE, for networks and objectives of your own.\n"
        "kdvit COMMAND --help tells more; kdvit --version tells the version."
    )

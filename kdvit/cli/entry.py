"""The command `kdvit`: which command is meant, and what a mistake is answered with."""

from __future__ import annotations

import os
import sys
import warnings

from kdvit.cli.arguments import COMMANDS, slurm_command
from kdvit.cli.config_files import find_configs, read_plain_values_alone
from kdvit.cli.fit import KdvitCLI, parse_fit
from kdvit.cli.messages import explain
from kdvit.cli.trust import build_no_callables
from kdvit.data.workers import let_collectives_end
from kdvit.distillers.plugins import load_plugins
from kdvit.runtime.processes import end_with_parent

NOISE = (
    "The `srun` command is available",  # with Slurm installed, on every run outside it
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own call
    "Checkpoint directory .* exists and is not empty",  # of every run that goes on
    "Experiment logs directory .* exists and is not empty",  # of every run, and untrue of one that goes on
    "FSDP2-wrapped module .* returned a view tensor",  # a feature map, which no distiller edits in place
    "LightningCLI's args parameter is intended",  # the arguments are those of the process, with config names resolved
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
    try:
        read_plain_values_alone()
        build_no_callables()
        load_plugins()
        if given and given[0] in COMMANDS:
            COMMANDS[given[0]](given[1:])
        elif given[:1] == ["slurm"]:
            slurm_command(given[1:], parse_fit)
        else:
            KdvitCLI(find_configs(given))
    except Exception as error:
        explanation = explain(error)
        if explanation is None or os.environ.get("KDVIT_TRACEBACK"):
            raise
        print(f"kdvit: error: {explanation}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        let_collectives_end()

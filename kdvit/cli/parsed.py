"""Commands of a Trainer that are parsed, and neither built nor run: for their config, or to show their help."""

from __future__ import annotations

from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from kdvit.cli.config_files import find_configs
from kdvit.cli.fit import KdvitCLI
from kdvit.cli.help import GROUPS
from kdvit.cli.parsing import without_imports
from kdvit.errors import UserError, nearest


class PlannedFit(KdvitCLI):
    """A `kdvit fit` that is parsed and checked, and neither built nor run."""

    def instantiate_classes(self) -> None:
        """Builds nothing."""
        self.subcommand = None


class ReadFit(PlannedFit):
    """The config of a `kdvit fit`, for commands that need parts of it and no run."""

    def before_instantiate_classes(self) -> None:
        """Skips the checks of a run."""

    def plain(self) -> dict[str, Any]:
        """Returns what the config says beyond the defaults, as YAML has it."""
        text = self._parser("fit").dump(self.config["fit"], skip_default=True, skip_link_targets=True)
        plain: dict[str, Any] = yaml.safe_load(text)
        return plain


class OptionsCLI(ReadFit):
    """The options of a command, as argparse has them, and nothing else of it."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses nothing, so that nothing is missing."""
        self.options = self._parser(self.command)._actions
        self.config = {"subcommand": None, "seed_everything": False}


class HelpCLI(KdvitCLI):
    """Shows the help of a command, all of it or one group.

    Args:
        command: Its name.
        topic: "all", or what the names of the options start with.
    """

    def __init__(self, command: str, topic: str) -> None:
        self.topic = topic
        super().__init__(command, [])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Prints the help, and ends.

        Raises:
            UserError: If no option has such a name.
        """
        shown = self._parser(self.command)
        if self.topic != "all":
            groups = {id(group): group for group in (*shown._action_groups, shown._optionals)}.values()
            for group in groups:
                kept = [each for each in group._group_actions if f"{each.dest}.".startswith(f"{self.topic}.")]
                group._group_actions[:] = kept
            if not any(group._group_actions for group in groups):
                known = [each.lstrip("-") for each in shown._option_string_actions]
                raise UserError(
                    f"No option starts with --{self.topic}.{nearest(self.topic, known)} Groups: {', '.join(GROUPS)}."
                )
        print(shown.format_help())
        raise SystemExit(0)


def parse_fit(args: list[str]) -> Any:
    """Returns the config of a `kdvit fit`, checked as far as that goes without building anything."""
    return PlannedFit("fit", find_configs(without_imports(args))).config["fit"]

"""The config of a run directory: what the run was trained with, and what its next start may change."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from textwrap import indent
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from kdvit.cli.messages import explain
from kdvit.cli.seeds import CACHE, UNSAID, read_config
from kdvit.errors import UserError
from kdvit.files import write_whole
from kdvit.runtime.loggers import boards

FIXED = ("model", "data", "seed_everything")
"""Parts of a config that say which run it is."""
SAID = ("data.init_args.batch_size", "model.compile", "model.student.init_args.grad_checkpointing")
"""What of them may change, and the log says so, as of all other parts."""
HISTORY = "# from step "
WANDB = "# W&B run "
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_str(value.value))
"""Callbacks of Lightning, such as Timer, have defaults that PyYAML cannot write."""


def is_wandb(logger: Logger) -> bool:
    """Tells whether a logger is of W&B, which need not be installed."""
    return any(cls.__name__ == "WandbLogger" for cls in type(logger).__mro__)


class SaveConfig(SaveConfigCallback):
    """Writes ``RUN/config.yaml`` in one piece, when a training starts that has something left to train.

    Lines on top of it say what has changed at which step. Loggers get the settings, TensorBoard the plan too.
    """

    def __init__(self, *args: Any, changes: tuple[str, ...] = (), plan: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.changes, self.plan = changes, plan

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Waits for the training."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the config."""
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / self.config_filename
            lines = file.read_text().splitlines() if file.is_file() and trainer.global_step else []
            lines = [line for line in lines if line.startswith(HISTORY)]
            lines += [f"{HISTORY}{trainer.global_step}: {change}" for change in self.changes]
            lines += [f"{WANDB}{each.version}" for each in trainer.loggers if is_wandb(each)]
            text = self.parser.dump(self.config, skip_none=False)
            write_whole(file, "".join(f"{line}\n" for line in [*lines, text.rstrip()]).encode())
            for logger in trainer.loggers:
                logger.log_hyperparams(yaml.safe_load(text))
            for board in boards(trainer) if self.plan else ():
                board.add_text("plan", indent(self.plan, "    "), 0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives TensorBoard's table of settings the run's best score, as ``best/METRIC``: without one it has no row."""
        monitored = [each for each in trainer.checkpoint_callbacks if getattr(each, "monitor", None)]
        scores = {f"best/{each.monitor}": each.best_model_score for each in monitored}  # type: ignore[attr-defined]
        known = {name: float(score) for name, score in scores.items() if score is not None}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and known:
                logger.log_hyperparams(logger.hparams, known, step=trainer.global_step)


def changes(root: Path, config: Any, parser: LightningArgumentParser) -> tuple[str, ...]:
    """Compares a config with that of the run in a folder.

    The parser reads the old one, too: an option that is newer than it has its default there.

    Returns:
        What differs and may, a text each.

    Raises:
        UserError: If the run in the folder was of another model or other data, or its config.yaml is torn.
    """
    file = root / "config.yaml"
    if not (written := read_config(file)):
        return ()
    try:
        old = parser.parse_object({key: written[key] for key in FIXED if key in written})
    except ArgumentError as error:
        raise UserError(
            f"{str(file)!r} has what this version of kdvit does not take: {explain(error)} Go on with the version that "
            "its line `# kdvit==` names, or choose another --trainer.default_root_dir."
        ) from error
    ours, theirs = (yaml.safe_load(parser.dump(each, skip_none=False)) for each in (config, old))
    theirs = {**written, **{part: theirs.get(part) for part in FIXED}}
    refused: list[str] = []
    said: list[str] = []
    for part in (*FIXED, *sorted(ours.keys() & written.keys() - {*FIXED})):
        for key, new, before in differing(ours.get(part), theirs.get(part), part):
            if key in UNSAID or (key == CACHE and new and before):
                continue
            refusing = part in FIXED and key not in SAID
            (refused if refusing else said).append(f"{key} is {new!r} and was {before!r}")
    if refused:
        raise UserError(
            f"{str(root)!r} holds a run with other settings: {'; '.join(refused[:5])}. Go on with its own "
            "config.yaml, or choose another --trainer.default_root_dir."
        )
    return tuple(sorted(said))


def settled_seed(given: bool | int, root: Path) -> int:
    """Returns the seed of a run. Where a switch is given, it is that of the run in the folder, or one that is drawn.

    All processes need the same: those that Lightning starts inherit it, and others cannot.

    Raises:
        UserError: If several processes that Slurm or torchrun has started would each draw their own.
    """
    if not isinstance(given, bool):
        return given
    before = read_config(root / "config.yaml").get("seed_everything")
    if type(before) is int:  # a bool has drawn none
        return before
    if "PL_GLOBAL_SEED" not in os.environ:
        several = max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")) > 1
        if several or "NODE_RANK" in os.environ:
            raise UserError("seed_everything: give a number, for each of these processes would draw another one.")
        os.environ["PL_GLOBAL_SEED"] = str(random.SystemRandom().randrange(2**31))
    return int(os.environ["PL_GLOBAL_SEED"])


def wandb_run(root: Path) -> str | None:
    """Returns the id of the W&B run that the run in a folder has written to, if it has.

    (It is a comment in config.yaml and no option: a run that begins with that config is another one.)
    """
    file = root / "config.yaml"
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.removeprefix(WANDB) for line in lines if line.startswith(WANDB)), None)


def differing(ours: Any, theirs: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields each key in which two configs differ, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted({*ours, *theirs}):
            yield from differing(ours.get(name), theirs.get(name), f"{key}.{name}")
    elif ours != theirs:
        yield key, ours, theirs

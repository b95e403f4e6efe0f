"""`kdvit fit`, `validate`, `test`, `predict`, `check`, `cache`: a config becomes data, module and Trainer, and runs."""

from __future__ import annotations

import os
from contextlib import ExitStack, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import add_instantiator, set_parsing_settings
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kdvit import callbacks
from kdvit.analysis import GeometryMonitor
from kdvit.callbacks.epoch_lines import in_terminal
from kdvit.cli.commands.check import describe
from kdvit.cli.help import EXAMPLES, SUMMARIES
from kdvit.cli.messages import options_known, unforeseen, unsaid, with_own_errors
from kdvit.cli.resuming import Start, find_start, match_classes, require_plain, require_same_student
from kdvit.cli.run_config import SaveConfig, settled_seed, wandb_run
from kdvit.cli.trainer import Trainer
from kdvit.data import ImageDataModule
from kdvit.distillers.plugins import load_plugins
from kdvit.errors import UserError, shown
from kdvit.runtime.checkpoints import StepCheckpoint, WholeCheckpointIO
from kdvit.runtime.length import RunEnd
from kdvit.runtime.lock import run_lock
from kdvit.runtime.loggers import run_loggers
from kdvit.runtime.processes import (
    SameCheckpoint,
    end_launched,
    is_first_process,
    planned_processes,
    require_all_processes,
    require_all_tasks,
    require_whole_networks,
)
from kdvit.structures import ImageFormat
from kdvit.training.module import DistillationModule
from kdvit.training.sharding import ShardedStrategy, require_shardable

SWITCHED: dict[str, type[Callback]] = {
    "bad_images": callbacks.BadImages,
    "throughput": callbacks.Throughput,
    "teacher_scores": callbacks.TeacherScores,
    "first_batch": callbacks.FirstBatch,
    "student_export": callbacks.StudentExport,
    "predictions": callbacks.PredictionWriter,
    "preemption": callbacks.Preemption,
}
"""Callbacks of every run by their key under `callbacks`, where null switches one off."""
ON_ONE_CPU = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "fast_dev_run": True,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""How a check runs, whatever the config says."""
OF_ONE_CPU = (
    "GPU available",
    "Running in `fast_dev_run` mode",
    "The 'train_dataloader' does not have many workers",
    "The 'val_dataloader' does not have many workers",
    "`Trainer.fit` stopped",
)
"""What Lightning then says, which is untrue of the run."""
ACCURACY, OBJECTIVES = "val/acc1", "val/loss"
"""What best.ckpt follows: where there are labels, and where there are none."""
WANDB_ID = "WANDB_RUN_ID"
"""What tells W&B which of its runs goes on, unless a logger has an id of its own."""


class KdvitCLI(LightningCLI):
    """One command of a Trainer.

    Args:
        command: Its name.
        args: The arguments behind the name.
    """

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        set_parsing_settings(instantiate_subclass_spec_in_any=False)  # where any value goes, a class_path is plain text
        add_instantiator(with_own_errors, object)
        load_plugins()
        try:
            with ExitStack() as self.held:
                self.held.enter_context(unsaid(*OF_ONE_CPU) if command == "check" else nullcontext())
                super().__init__(
                    DistillationModule,
                    pl.LightningDataModule,
                    save_config_callback=SaveConfig,
                    trainer_class=Trainer,
                    trainer_defaults={"default_root_dir": "runs/default"},
                    seed_everything_default=0,
                    parser_kwargs={
                        "prog": "kdvit",
                        "exit_on_error": False,
                        "allow_abbrev": False,
                        command: _help(command),
                    },
                    subclass_mode_data=True,
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                    args=[command, *args],
                )
        except (UserError, OSError):  # what all processes have met is told once
            end_launched(getattr(self, "trainer", None))
            raise

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Names this command alone: to build the parser of one takes a second."""
        return {self.command: LightningCLI.subcommands().get(self.command, {"model", "datamodule"})}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Writes kdvit's version on top of every saved config."""
        return super().init_parser(dump_header=[f"kdvit=={version('kdvit')}"], **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds callbacks and checkpoints, and gives the data's image format and class names to the model."""
        parser.add_lightning_class_args(callbacks.StudentEMA, "ema")
        parser.add_lightning_class_args(callbacks.NonFiniteGuard, "nonfinite")
        parser.add_lightning_class_args(GeometryMonitor, "geometry")
        parser.add_lightning_class_args(callbacks.LabelledProbe, "probe")
        for key, callback in SWITCHED.items():
            default = {"class_path": f"{callback.__module__}.{callback.__name__}"}
            parser.add_argument(f"--callbacks.{key}", type=callback | None, default=default)
        best: dict[str, Any] = {"filename": "best", "monitor": ACCURACY}
        last: dict[str, Any] = {"filename": "last"}
        for key, defaults in {"checkpoint": best, "last_checkpoint": last}.items():
            parser.add_lightning_class_args(StepCheckpoint, key)
            of_kdvit = {**defaults, "enable_version_counter": False}
            parser.set_defaults({f"{key}.{name}": value for name, value in of_kdvit.items()})
            parser.link_arguments("trainer.default_root_dir", f"{key}.dirpath", compute_fn=_checkpoint_folder)
        parser.link_arguments("data", "model.image_format", compute_fn=format_of, apply_on="instantiate")
        parser.link_arguments("data", "model.class_names", compute_fn=self._class_names, apply_on="instantiate")

    def _class_names(self, data: Any) -> list[str] | None:
        """Returns the names of the model's classes: a trained student's own, and none where there are no labels."""
        names = getattr(data, "class_names", None)
        known = self.start.class_names if names is None or len(names) else None
        return known or (None if names is None else list(names))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and reads the checkpoint that is given before Lightning looks into it for changes of the config."""
        known = self._parser(self.command)._option_string_actions
        with unforeseen("The config cannot be read."), options_known(self.command, known):
            super().parse_arguments(parser, args)
        config = self.config.get(self.command)
        if config is not None:
            config.seed_everything = settled_seed(config.seed_everything, Path(config.trainer.default_root_dir))
            if config.get("ckpt_path") and Path(config.ckpt_path).is_file():
                require_plain(Path(config.ckpt_path))

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint: `best` and `last` are the run's own, and a fit goes on where its run stopped."""
        config = self.config[self.command]
        if self.command in ("fit", "check"):
            epochs, steps = config.trainer.max_epochs, config.trainer.max_steps
            if (epochs or -1) < 1 and steps < 1:
                raise UserError(
                    "The schedule needs the length of the run: set trainer.max_epochs or trainer.max_steps."
                )
        self.start = Start()
        if self.command not in ("check", "cache"):
            self.start = find_start(self.command, config, self._parser(self.command))
            self.save_config_kwargs = {**self.save_config_kwargs, "changes": self.start.changes}

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer, unless nothing is left to train; what is wrong with a config shows here."""
        if self.command != "check":
            trainer = self.config[self.command].trainer
            require_all_tasks(planned_processes(trainer.devices, trainer.num_nodes))
        if self.start.is_done:
            self.subcommand = None
            return
        with (
            unforeseen("The config cannot be built."),
            shown((ValueError, TypeError, OSError, ImportError, RuntimeError, MisconfigurationException)),
        ):
            super().instantiate_classes()
            if self.start.checkpoint is not None:
                require_same_student(self.start.checkpoint, self.model)
            elif not self.model.class_names:
                self.model.class_names = self.start.class_names
            match_classes(self.start.class_names, self.datamodule)
        if self.command not in ("check", "cache"):
            self.config_init[self.command]["ckpt_path"] = self.start.checkpoint
            self.config_init[self.command]["weights_only"] = True

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Builds the Trainer of the command, and refuses what would go wrong in its processes."""
        if self.command == "fit" and is_first_process():
            with shown((OSError,), prefix="trainer.default_root_dir: "):
                self.held.enter_context(run_lock(self.config_init["fit"].trainer.default_root_dir))
            if self.start.checkpoint is None and self.config_init["fit"].trainer.logger is not False:
                plan = self._plan(self.config_init["fit"])
                self.save_config_kwargs = {**self.save_config_kwargs, "plan": plan}
        self._follow_objectives()
        trainer = super().instantiate_trainer(**self._options(self.config_init[self.command]))
        for each in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(each, (LearningRateFinder, BatchSizeFinder)):
                raise UserError(
                    f"{type(each).__name__} would train with other numbers than config.yaml says. Leave it out, and "
                    "set model.optimizer.lr and the data's batch_size."
                )
        if self.command == "check":
            return trainer
        if isinstance(trainer.strategy, ShardedStrategy) and self.command != "cache":
            require_shardable(trainer, self.model)
        else:
            require_whole_networks(trainer)
        require_all_processes(trainer)
        return trainer

    def _follow_objectives(self) -> None:
        """Lets best.ckpt follow the objectives of the validation where there is no accuracy to follow."""
        options = self.config[self.command].get("checkpoint")
        alone = self.model.task_weight == 0 and not self.model.supervised
        if options and options.monitor == ACCURACY and alone:
            best = {**options, "monitor": OBJECTIVES, "mode": None}
            self.config_init[self.command].checkpoint = StepCheckpoint(**best)
            if self.command == "fit":
                rank_zero_info(f"Without labels there is no {ACCURACY}: best.ckpt is that of the least {OBJECTIVES}.")

    def _options(self, given: Any) -> dict[str, Any]:
        """Returns the Trainer's options that follow from the command."""
        own = given.trainer.callbacks or []
        switched_on = vars(given.callbacks).values() if given.callbacks else ()
        used = [*(own if isinstance(own, list) else [own]), *filter(None, switched_on)]
        if self.command == "check":
            return {**ON_ONE_CPU, "callbacks": used}
        used.insert(0, SameCheckpoint(self.start.checkpoint))
        shown = _shown(given.trainer, used)
        if self.command != "fit":
            used += [callbacks.ScoreLine()] * (self.command in ("validate", "test"))
            return {"logger": False, "callbacks": used, **shown}
        epochs, steps = given.trainer.max_epochs or -1, given.trainer.max_steps
        used.insert(0, RunEnd(steps if steps > 0 else None, has_epochs=epochs > 0))
        plugins = given.trainer.plugins if isinstance(given.trainer.plugins, list) else [given.trainer.plugins]
        logger = given.trainer.logger
        if logger is not False:
            ours = run_loggers(given.trainer.default_root_dir, self.start.checkpoint)
            logger = [*ours, *(logger if isinstance(logger, list) else [logger] if isinstance(logger, Logger) else [])]
            run = wandb_run(Path(given.trainer.default_root_dir)) if self.start.checkpoint else None
            if run and WANDB_ID not in os.environ:
                os.environ[WANDB_ID] = run
                self.held.callback(os.environ.pop, WANDB_ID)
        return {
            **shown,
            "plugins": [*filter(None, plugins), WholeCheckpointIO()],
            "logger": logger,
            "callbacks": used,
            "max_epochs": epochs,
            "max_steps": -1,
        }

    def before_check(self) -> None:
        """Shows what a fit will do, as it is planned and not as it is checked."""
        given = self.config_init["check"]
        if not isinstance(self.datamodule, ImageDataModule):  # those of others have their data once they are set up
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
        workers = getattr(self.datamodule, "num_workers", 0)
        self.datamodule.num_workers = 0
        with unforeseen("The config cannot be described."):
            saved = given.checkpoint, given.last_checkpoint
            told = describe(self.model, self.datamodule, given.trainer, saved, workers, given.images_per_second)
        print(told, flush=True)

    def _plan(self, given: Any) -> str:
        """Returns the table that a check shows, as far as it needs no image."""
        try:
            saved = given.checkpoint, given.last_checkpoint
            return describe(self.model, self.datamodule, given.trainer, saved, workers=0, measure=False)
        except Exception as error:  # a class of the user's may raise anything, and trains nevertheless
            return f"The run cannot be described: {error}"


def _shown(trainer: Any, used: list[Callback]) -> dict[str, Any]:
    """Adds what a run says to its callbacks, and returns the Trainer's options that leave out Lightning's own."""
    summary = trainer.enable_model_summary is not False and not any(isinstance(each, ModelSummary) for each in used)
    bar = in_terminal() or trainer.enable_progress_bar is False or any(isinstance(each, ProgressBar) for each in used)
    used += [callbacks.NetworkLine()] * summary + [callbacks.EpochLines()] * (not bar)
    return {"enable_model_summary": False}


def _help(command: str) -> dict[str, Any]:
    """Returns the options of a command's parser: a usage of one line, and an example at the end."""
    example = f"example: kdvit {command} {EXAMPLES[command]}"
    usage = f"kdvit {command} --config CONFIG [options]"
    return {"exit_on_error": False, "usage": usage, "description": SUMMARIES[command], "epilog": example}


def _checkpoint_folder(root: Any) -> str:
    return str(Path(root) / "checkpoints")


def format_of(data: Any) -> ImageFormat:
    """Returns how a data module's images arrive.

    Raises:
        UserError: If it does not say.
    """
    found = getattr(data, "image_format", None)
    if not isinstance(found, ImageFormat):
        raise UserError(
            f"data: {type(data).__name__} does not say how its images are normalised, by which a teacher converts them "
            "and an exported student is told. Give it an attribute image_format = kdvit.ImageFormat((224, 224), mean, "
            "std), with the numbers of its transform."
        )
    return found

"""The command line: LightningCLI for what runs a Trainer, and the commands that need none."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kdvit.analysis import GeometryMonitor
from kdvit.callbacks import (
    BadImages,
    NonFiniteGuard,
    PredictionWriter,
    Preemption,
    StudentEMA,
    StudentExport,
    TeacherScores,
    Throughput,
)
from kdvit.cli.commands.check import describe
from kdvit.cli.config_files import find_configs
from kdvit.cli.messages import unforeseen
from kdvit.cli.resuming import SaveConfig, find_checkpoint, require_plain
from kdvit.cli.trainer import Trainer
from kdvit.cli.trust import refuse_code, refuse_folder_of_config, refuse_writing_elsewhere
from kdvit.data import ImageDataModule
from kdvit.errors import UserError
from kdvit.runtime.checkpoints import StepCheckpoint, WholeCheckpointIO, refuse_saving_on_errors
from kdvit.runtime.loggers import run_loggers
from kdvit.runtime.processes import (
    SameCheckpoint,
    planned_processes,
    require_all_processes,
    require_all_tasks,
    require_whole_networks,
)
from kdvit.training.module import DistillationModule
from kdvit.training.sharding import ShardedStrategy, require_shardable


class KdvitCLI(LightningCLI):
    """`kdvit fit`, `validate`, `test`, `predict`, `check` and `cache`."""

    def __init__(self, args: list[str]) -> None:
        callbacks = [BadImages(), Throughput(), TeacherScores(), StudentExport(), PredictionWriter(), Preemption()]
        super().__init__(
            DistillationModule,
            pl.LightningDataModule,
            save_config_callback=SaveConfig,
            trainer_class=Trainer,
            trainer_defaults={"default_root_dir": "runs/default", "callbacks": callbacks},
            seed_everything_default=0,
            parser_kwargs={
                "prog": "kdvit",
                "exit_on_error": False,
                "description": "Distill vision transformers. More commands, each with --help: analyze (the encoding mismatch of "
                "a pair, and what to do), slurm (submits a fit), distillers (lists the objectives), compare (finished runs), benchmark (what networks cost), export (a student), import (a "
                "checkpoint of the authors).",
                "version": version("kdvit"),
                **{name: {"exit_on_error": False} for name in self.subcommands()},
            },
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, `check` and `cache`."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in ("check", "cache")}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Writes kdvit's version on top of every saved config."""
        return super().init_parser(dump_header=[f"kdvit=={version('kdvit')}"], **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `ema`, `nonfinite`, `geometry` and the checkpoints, and hands the data's image format and class names to the model."""
        parser.add_lightning_class_args(StudentEMA, "ema")
        parser.add_lightning_class_args(NonFiniteGuard, "nonfinite")
        parser.add_lightning_class_args(GeometryMonitor, "geometry")
        best: dict[str, Any] = {"filename": "best", "monitor": "val/acc1", "mode": "max"}
        last: dict[str, Any] = {"filename": "last"}
        for key, defaults in {"checkpoint": best, "last_checkpoint": last}.items():
            parser.add_lightning_class_args(StepCheckpoint, key)
            defaults = {**defaults, "enable_version_counter": False}
            parser.set_defaults({f"{key}.{name}": value for name, value in defaults.items()})
            parser.link_arguments("trainer.default_root_dir", f"{key}.dirpath", compute_fn=_checkpoint_folder)
        parser.link_arguments("data", "model.image_format", compute_fn=_image_format, apply_on="instantiate")
        parser.link_arguments("data", "model.class_names", compute_fn=_class_names, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; what no one has foreseen of a config is the config's fault, too."""
        try:
            super().parse_arguments(parser, args)
        except (ArgumentError, UserError):
            raise
        except Exception as error:
            raise UserError(unforeseen("read", error)) from error
        config = self.config.get(self.config.get("subcommand"), {})
        refuse_folder_of_config(config, args)
        given = config.get("ckpt_path")
        if given and Path(given).is_file():  # of which Lightning reads changes of the config, next
            require_plain(Path(given))

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint: `best` and `last` are the run's own, and a fit goes on where its run stopped."""
        config = self.config[self.subcommand]
        refuse_code(config)
        refuse_writing_elsewhere(config)
        if config.get("weights_only") is False:
            raise UserError(
                "weights_only: false would let a checkpoint run code. Leave it out: kdvit loads no such file."
            )
        if self.subcommand in ("fit", "check") and config.trainer.max_epochs in (None, -1):
            raise UserError("The schedule needs the length of the run: set trainer.max_epochs.")
        self.checkpoint = None
        if self.subcommand not in ("check", "cache"):
            self.checkpoint = find_checkpoint(str(self.subcommand), config, self._parser(self.subcommand))

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer; what is wrong with a config shows here."""
        if self.subcommand != "check":
            trainer = self.config[self.subcommand].trainer
            require_all_tasks(planned_processes(trainer.devices, trainer.num_nodes))
        try:
            super().instantiate_classes()
            if self.subcommand in ("fit", "check", "cache") and isinstance(self.datamodule, ImageDataModule):
                self.datamodule.require("train")
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, MisconfigurationException) as error:
            raise UserError(str(error)) from error
        except Exception as error:
            raise UserError(unforeseen("built", error)) from error
        if self.subcommand not in ("check", "cache"):
            self.config_init[self.subcommand]["ckpt_path"] = self.checkpoint
            self.config_init[self.subcommand]["weights_only"] = True

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Gives a fit its loggers; a check runs on one CPU process, whatever the config says."""
        given = self.config_init[self.subcommand]["trainer"]
        root = given["default_root_dir"]
        if self.subcommand == "check":
            kwargs = {
                "accelerator": "cpu",
                "devices": 1,
                "num_nodes": 1,
                "strategy": "auto",
                "precision": "32-true",
                "fast_dev_run": True,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            }
        elif self.subcommand != "fit":
            kwargs = {"logger": False}
        else:
            plugins = given["plugins"] if isinstance(given["plugins"], list) else [given["plugins"]]
            kwargs = {"plugins": [*filter(None, plugins), WholeCheckpointIO()]}
            if given["logger"] in (None, True):
                kwargs["logger"] = run_loggers(root, self.checkpoint)
        trainer = super().instantiate_trainer(**kwargs)
        refuse_saving_on_errors(trainer.callbacks)  # type: ignore[attr-defined]
        if self.subcommand == "check":
            planned = planned_processes(given["devices"], given["num_nodes"])
            loading = getattr(self.datamodule, "num_workers", 0), self.config_init["check"]["images_per_second"]
            self.datamodule.num_workers = 0
            print(
                describe(self.model, self.datamodule, planned, given["accumulate_grad_batches"], *loading), flush=True
            )
        else:
            if isinstance(trainer.strategy, ShardedStrategy) and self.subcommand != "cache":
                require_shardable(trainer, self.model)
            else:
                require_whole_networks(trainer)
            require_all_processes(trainer)
            trainer.callbacks.insert(0, SameCheckpoint(self.checkpoint))  # type: ignore[attr-defined]
        return trainer


class PlannedFit(KdvitCLI):
    """A `kdvit fit` that is parsed and checked, and neither built nor run."""

    def instantiate_classes(self) -> None:
        """Leaves it at the config."""
        self.subcommand = None


def parse_fit(args: list[str]) -> Any:
    """Returns the config of a `kdvit fit` with these arguments, checked as far as that goes without building anything."""
    return PlannedFit(find_configs(["fit", *args])).config["fit"]


def _checkpoint_folder(root: Any) -> str:
    return str(Path(root) / "checkpoints")


def _image_format(data: Any) -> Any:
    return getattr(data, "image_format", None)


def _class_names(data: Any) -> Any:
    return getattr(data, "class_names", None)

"""The command line: LightningCLI for what runs a Trainer, and the commands that need none."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import kdvit.data  # noqa: F401  (short class names resolve for imported classes)
from kdvit import __version__
from kdvit.callbacks import PredictionWriter, StudentEMA, StudentExport, TeacherScores, Throughput
from kdvit.check import describe
from kdvit.compare import compare
from kdvit.config_files import find_configs
from kdvit.loggers import run_loggers
from kdvit.messages import UserError, explain
from kdvit.models import export_student, load_released
from kdvit.models.checkpoint import student_spec
from kdvit.models.cost import parameter_count
from kdvit.module import DistillationModule
from kdvit.plugins import known_distillers, load_plugins

NOISE = (
    "The `srun` command is available",  # with Slurm installed, on every run outside it
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own call
    "Checkpoint directory .* exists and is not empty",  # of every run that goes on
    "Experiment logs directory .* exists and is not empty",  # of every run, and untrue of one that goes on
    "LightningCLI's args parameter is intended",  # the arguments are those of the process, with config names resolved
)


class Trainer(pl.Trainer):
    """Lightning's Trainer, which can also check a run."""

    def check(self, model: DistillationModule, datamodule: pl.LightningDataModule) -> None:
        """Build everything, show what a run will do, and take one training and one validation batch on the CPU."""
        callbacks: list[pl.Callback] = self.callbacks  # type: ignore[has-type]
        self.callbacks = [each for each in callbacks if not isinstance(each, (Checkpoint, StudentExport))]
        try:
            self.fit(model, datamodule=datamodule)
        except Exception as error:
            raise UserError(f"The first batches failed. {type(error).__name__}: {error}") from error
        print("One training and one validation batch went through. This config is ready for `kdvit fit`.")


class SaveConfig(SaveConfigCallback):
    """Saves the run's config.yaml, when training starts and not when a trained run is read."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Saves the config before fit."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class KdvitCLI(LightningCLI):
    """`kdvit fit`, `validate`, `test`, `predict` and `check`."""

    def __init__(self, args: list[str]) -> None:
        callbacks = [Throughput(), TeacherScores(), StudentExport(), PredictionWriter()]
        super().__init__(
            DistillationModule,
            pl.LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_class=Trainer,
            trainer_defaults={"default_root_dir": "runs/default", "callbacks": callbacks},
            seed_everything_default=0,
            parser_kwargs={
                "prog": "kdvit",
                "exit_on_error": False,
                "description": "Distill vision transformers. More commands: `kdvit distillers` lists the objectives, "
                "`kdvit compare RUN ...` shows finished runs side by side, `kdvit import FILE` reads an authors' checkpoint.",
                "version": __version__,
                **{name: {"exit_on_error": False} for name in self.subcommands()},
            },
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, and `check`."""
        return {**LightningCLI.subcommands(), "check": {"model", "datamodule"}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Writes kdvit's version on top of every saved config."""
        return super().init_parser(dump_header=[f"kdvit=={__version__}"], **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `ema` and the checkpoints, and hands the data's image format and class names to the model."""
        parser.add_lightning_class_args(StudentEMA, "ema")
        best: dict[str, Any] = {"filename": "best", "monitor": "val/acc1", "mode": "max"}
        last: dict[str, Any] = {"filename": "last"}
        for key, defaults in {"checkpoint": best, "last_checkpoint": last}.items():
            parser.add_lightning_class_args(ModelCheckpoint, key)
            defaults = {**defaults, "enable_version_counter": False}
            parser.set_defaults({f"{key}.{name}": value for name, value in defaults.items()})
            parser.link_arguments("trainer.default_root_dir", f"{key}.dirpath", compute_fn=_checkpoint_folder)
        parser.link_arguments("data", "model.image_format", compute_fn=_image_format, apply_on="instantiate")
        parser.link_arguments("data", "model.class_names", compute_fn=_class_names, apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint: `best` and `last` are the run's own, and a fit goes on where its run stopped."""
        config = self.config[self.subcommand]
        if self.subcommand in ("fit", "check") and config.trainer.max_epochs in (None, -1):
            raise UserError("The schedule needs the length of the run: set trainer.max_epochs.")
        if self.subcommand == "check":
            return
        folder = Path(config.last_checkpoint.dirpath)
        if self.subcommand == "fit" and config.ckpt_path is None and (folder / "last.ckpt").is_file():
            config.ckpt_path = "last"
            rank_zero_info(
                f"Going on from {folder / 'last.ckpt'}. (To start anew, choose another --trainer.default_root_dir.)"
            )
        if config.ckpt_path in ("best", "last"):
            file = folder / f"{config.ckpt_path}.ckpt"
            if not file.is_file():
                raise UserError(f"There is no {str(file)!r}: train first, or give --ckpt_path a file.")
            config.ckpt_path = str(file)

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer; what is wrong with a config shows here."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, MisconfigurationException) as error:
            raise UserError(str(error)) from error

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
        elif given["logger"] in (None, True):
            kwargs = {"logger": run_loggers(root, self.config.fit.ckpt_path)}
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "check":
            print(
                describe(self.model, self.datamodule, _processes(given), given["accumulate_grad_batches"]), flush=True
            )
        return trainer


def _checkpoint_folder(root: Any) -> str:
    return str(Path(root) / "checkpoints")


def _image_format(data: Any) -> Any:
    return getattr(data, "image_format", None)


def _class_names(data: Any) -> Any:
    return getattr(data, "class_names", None)


def _processes(trainer: Any) -> int:
    devices = trainer["devices"]
    nodes: int = trainer["num_nodes"]
    return nodes * (devices if isinstance(devices, int) and devices > 0 else 1)


def compare_command(args: list[str]) -> None:
    """Runs `kdvit compare`."""
    parser = ArgumentParser(prog="kdvit compare", description=COMPARE, exit_on_error=False)
    parser.add_argument("runs", nargs="+", help="run directories of `kdvit fit`")
    parser.add_argument("--out", default="runs/comparison", help="folder of curves.png and comparison.json")
    given = parser.parse_args(args)
    compare(given.runs, given.out)


def distillers_command(args: list[str]) -> None:
    """Runs `kdvit distillers`."""
    ArgumentParser(prog="kdvit distillers", description="List the objectives by their short names.").parse_args(args)
    for name, summary in known_distillers().items():
        print(f"{name:<20} {summary}")


def import_command(args: list[str]) -> None:
    """Runs `kdvit import`."""
    parser = ArgumentParser(prog="kdvit import", description=IMPORT, exit_on_error=False)
    parser.add_argument("checkpoint", help="the authors' .pth file")
    parser.add_argument("--out", required=True, help="folder of the student; kdvit.load_student reads it")
    parser.add_argument("--weights", choices=["raw", "ema"], default="raw", help="raw is what the paper reports")
    parser.add_argument("--num_heads", type=int, help="heads of the wide blocks, where they are not 64 channels each")
    given = parser.parse_args(args)
    try:
        released = load_released(given.checkpoint, given.weights == "ema", given.num_heads)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    student = released.student
    export_student(student, student_spec(student, student.image_format), given.out)
    print(
        f"{type(student).__name__}, {parameter_count(student):,} parameters, {given.weights} weights, in {given.out}."
    )
    if released.dropped:
        print(f"Left out, as no output depends on them: {', '.join(released.dropped)}.")


COMPARE = "Show finished runs side by side: parameters, latency, accuracy and time as a table, the curves as a picture."
IMPORT = "Turn a Lift or WideLast checkpoint of the authors into a student of kdvit."
COMMANDS = {"compare": compare_command, "distillers": distillers_command, "import": import_command}


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
    try:
        load_plugins()
        if given and given[0] in COMMANDS:
            COMMANDS[given[0]](given[1:])
        else:
            KdvitCLI(find_configs(given))
    except Exception as error:
        explanation = explain(error)
        if explanation is None or os.environ.get("KDVIT_TRACEBACK"):
            raise
        print(f"kdvit: error: {explanation}", file=sys.stderr)
        raise SystemExit(2) from None

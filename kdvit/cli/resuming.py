"""What a run goes on from, and what it leaves for the next start: its checkpoints and its config."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from kdvit.cli.messages import explain
from kdvit.errors import UserError, shown
from kdvit.files import write_whole
from kdvit.models.released import read_weights_only
from kdvit.runtime.checkpoints import newest_checkpoint, require_whole, training_step

COMPARED = ("model", "data", "seed_everything")
MAY_CHANGE = ("data.init_args.root", "data.init_args.num_workers", "data.init_args.on_error")
"""A run may go on elsewhere, and past a damaged image."""
CACHE = "data.init_args.cache"
"""May move, too: what it holds is compared when it is opened."""


class SaveConfig(SaveConfigCallback):
    """Writes ``RUN/config.yaml`` in one piece, when training starts and not when a trained run is read."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes the config before fit."""
        if stage == "fit" and trainer.is_global_zero:
            text = self.parser.dump(self.config, skip_none=False)
            write_whole(Path(trainer.default_root_dir) / self.config_filename, text.encode())


def find_checkpoint(command: str, config: Any, parser: LightningArgumentParser) -> str | None:
    """Returns the checkpoint that a command starts from, None for none.

    `best` and `last` are the run's own. By default a fit goes on from the newest whole one of its run directory, and
    other commands read the best.

    Args:
        command: fit, validate, test or predict.
        config: Its config.
        parser: Its parser, which reads the config of the run to go on with.

    Raises:
        UserError: If the checkpoint is missing or damaged, holds more than tensors and plain values, or is of another
            run.
    """
    folder = Path(config.last_checkpoint.dirpath)
    if config.ckpt_path is not None:
        return _named(config.ckpt_path, folder, command)
    if command == "fit":
        return _newest(folder, config, parser)
    file = folder / "best.ckpt"
    if not file.is_file():
        rank_zero_info(f"There is no {file}: the student is taken as the config builds it.")
        return None
    require_plain(file)
    return str(file)


def require_plain(file: Path) -> None:
    """Raises UserError if a checkpoint is damaged, holds more than tensors and plain values, or changes the config."""
    with shown((ValueError,)):
        content = read_weights_only(file)
        require_whole(file)
    if "hyper_parameters" in content:
        raise UserError(
            f"{str(file)!r} is no checkpoint of `kdvit fit`: it would change the config by its hyper_parameters."
        )


def _named(name: str, folder: Path, command: str) -> str:
    own = name in ("best", "last")
    file = folder / f"{name}.ckpt" if own else Path(name)
    if not file.is_file():
        raise UserError(f"There is no {str(file)!r}: train first, or give --ckpt_path a file.")
    if own:  # a file was read when the config was parsed
        require_plain(file)
    if command == "fit":
        try:
            training_step(file)
        except ValueError as error:
            raise UserError(f"{error} Training goes on from a checkpoint of `kdvit fit`.") from error
    return str(file)


def _newest(folder: Path, config: Any, parser: LightningArgumentParser) -> str | None:
    file = newest_checkpoint(folder)
    if file is not None:
        _refuse_another_run(Path(config.trainer.default_root_dir), config, parser)
        rank_zero_info(
            f"Going on from {file}, step {training_step(file)}. "
            "(To start anew, choose another --trainer.default_root_dir.)"
        )
        return str(file)
    if any(folder.glob("*.ckpt")):
        raise UserError(
            f"Training can go on from none of the checkpoints in {str(folder)!r} (the lines above say why), and a run "
            "from the start would overwrite them. Restore one, remove them, or choose another "
            "--trainer.default_root_dir."
        )
    return None


def _refuse_another_run(root: Path, config: Any, parser: LightningArgumentParser) -> None:
    """Raises UserError if the run to go on with was of another model or other data.

    The parser reads the old config, too: an option that is newer than it has its default there.
    """
    file = root / "config.yaml"
    if not file.is_file():
        return
    written = _read_config(file)
    try:
        old = parser.parse_object({key: written[key] for key in COMPARED if key in written})
    except ArgumentError as error:
        raise UserError(
            f"{str(file)!r} has what this version of kdvit does not take: {explain(error)} Go on with the version that "
            "its first line names, or choose another --trainer.default_root_dir."
        ) from error
    ours, theirs = (yaml.safe_load(parser.dump(each, skip_none=False)) for each in (config, old))
    differing = [
        f"{key} is {new!r} and was {before!r}"
        for part in COMPARED
        for key, new, before in _differing(ours.get(part), theirs.get(part), part)
        if key not in MAY_CHANGE and not (key == CACHE and new and before)
    ]
    if differing:
        raise UserError(
            f"{str(root)!r} holds a run with other settings: {'; '.join(differing[:5])}. Go on with its own "
            "config.yaml, or choose another --trainer.default_root_dir."
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"it holds {type(config).__name__}, no mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{str(file)!r} is damaged, so nobody can say whether the run in this folder is the one of your config "
            f"({reason}). If you know that it is, remove the file and give the same command again: it is written anew."
        ) from error
    return config


def _differing(ours: Any, theirs: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields each key in which two configs differ, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted({*ours, *theirs}):
            yield from _differing(ours.get(name), theirs.get(name), f"{key}.{name}")
    elif ours != theirs:
        yield key, ours, theirs

"""What a run goes on from, and what it leaves for the next start: its checkpoints and its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from kdvit.errors import UserError
from kdvit.files import write_whole
from kdvit.models.released import read_weights_only
from kdvit.runtime.checkpoints import newest_checkpoint, require_whole, training_step

COMPARED = ("model", "data", "seed_everything")
MAY_MOVE = (  # a run may go on elsewhere, and past an image that has come to harm
    "data.init_args.root ",
    "data.init_args.num_workers ",
    "data.init_args.on_error ",
)


class SaveConfig(SaveConfigCallback):
    """Writes ``RUN/config.yaml`` in one piece, when training starts and not when a trained run is read."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes the config before fit."""
        if stage == "fit" and trainer.is_global_zero:
            text = self.parser.dump(self.config, skip_none=False)
            write_whole(Path(trainer.default_root_dir) / self.config_filename, text.encode())


def find_checkpoint(command: str, config: Any, text: str) -> str | None:
    """Returns the checkpoint that a command starts from, None for none.

    `best` and `last` are the run's own. By default a fit goes on from the newest whole one of its run directory, and other
    commands read the best.

    Args:
        command: fit, validate, test or predict.
        config: Its config.
        text: The config as YAML, to be compared with that of the run to go on with.

    Raises:
        UserError: If the checkpoint is not there or not whole, holds more than tensors and plain values, or is of another run.
    """
    root, folder = Path(config.trainer.default_root_dir), Path(config.last_checkpoint.dirpath)
    if config.ckpt_path is not None:
        named = config.ckpt_path in ("best", "last")
        file = folder / f"{config.ckpt_path}.ckpt" if named else Path(config.ckpt_path)
        if not file.is_file():
            raise UserError(f"There is no {str(file)!r}: train first, or give --ckpt_path a file.")
        if named:  # a file was read when the config was parsed
            require_plain(file)
        if command == "fit":
            _require_training(file)
    elif command == "fit":
        newest = newest_checkpoint(folder)
        if newest is None:
            if any(folder.glob("*.ckpt")):
                raise UserError(
                    f"From none of the checkpoints in {str(folder)!r} can training go on (the lines above say why), and a run from the "
                    "start would overwrite them. Restore one, remove them, or choose another --trainer.default_root_dir."
                )
            return None
        _refuse_another_run(root, yaml.safe_load(text))
        file = newest
        rank_zero_info(
            f"Going on from {file}, step {training_step(file)}. (To start anew, choose another --trainer.default_root_dir.)"
        )
    else:
        file = folder / "best.ckpt"
        if not file.is_file():
            rank_zero_info(f"There is no {file}: the student is taken as the config builds it.")
            return None
        require_plain(file)
    return str(file)


def require_plain(file: Path) -> None:
    """Raises UserError if a checkpoint is damaged, holds more than tensors and plain values, or would change the config."""
    try:
        content = read_weights_only(file)
        require_whole(file)
    except ValueError as error:
        raise UserError(str(error)) from error
    if "hyper_parameters" in content:
        raise UserError(
            f"{str(file)!r} is no checkpoint of `kdvit fit`: it would change the config by its hyper_parameters."
        )


def _require_training(file: Path) -> None:
    try:
        training_step(file)
    except ValueError as error:
        raise UserError(f"{error} Training goes on from a checkpoint of `kdvit fit`.") from error


def _refuse_another_run(root: Path, ours: dict[str, Any]) -> None:
    """Raises if the run to go on with was of another model or other data."""
    file = root / "config.yaml"
    if not file.is_file():
        return
    theirs = _read_config(file)
    for config in (ours, theirs):
        data = (config.get("data") or {}).get("init_args") or {}
        data["cache"] = data.get("cache") is not None  # may move: what it holds is compared when it is opened
    differing = [
        key
        for part in COMPARED
        for key in _differing(ours.get(part), theirs.get(part), part)
        if not key.startswith(MAY_MOVE)
    ]
    if differing:
        raise UserError(
            f"{str(root)!r} holds a run with other settings: {'; '.join(differing[:5])}. Go on with its own config.yaml, "
            "or choose another --trainer.default_root_dir."
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"it holds {type(config).__name__}, no mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{str(file)!r} is damaged, so nobody can say whether the run in this folder is the one of your config ({reason}). "
            "If you know that it is, remove the file and give the same command again: it is written anew."
        ) from error
    return config


def _differing(ours: Any, theirs: Any, key: str) -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted({*ours, *theirs})
        return [each for name in names for each in _differing(ours.get(name), theirs.get(name), f"{key}.{name}")]
    return [] if ours == theirs else [f"{key} is {ours!r} and was {theirs!r}"]

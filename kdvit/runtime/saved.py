"""What checkpoints on disk hold: the newest of a run, how far it has come, and whether all of it is there."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint of a run that has come furthest, of equals ``last.ckpt``; None if there is none.

    A file that cannot be read, or from which training cannot go on, is skipped, and the log says why.
    """
    steps = {}
    for file in sorted(folder.glob("*.ckpt"), key=lambda each: each.name == "last.ckpt", reverse=True):
        if (come := _or_none(progress, file)) is not None:
            steps[file] = come.step
    newest_first = sorted(steps, key=lambda each: steps[each], reverse=True)
    return next((file for file in newest_first if _or_none(require_whole, file)), None)


def _or_none(read: Callable[[Path], Any], file: Path) -> Any:
    try:
        return read(file)
    except ValueError as error:
        rank_zero_info(f"{error} It is skipped.")
        return None


def require_whole(file: Path) -> Path:
    """Checks a checkpoint by the checksums of its parts: what unpickles may still hold other numbers.

    Returns:
        The file.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        damaged = zipfile.ZipFile(file).testzip()
    except Exception as error:  # damaged bytes can lead zipfile anywhere
        raise ValueError(f"{file} is no whole checkpoint ({_said(error)}).") from error
    if damaged is not None:
        raise ValueError(f"{file} is no whole checkpoint (its part {damaged} is damaged).")
    return file


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        step: Steps of the optimizer.
        epochs: Whole epochs.
        amid: Whether it stands amid an epoch.
        validates: Whether a validation is due or interrupted.
    """

    step: int
    epochs: int
    amid: bool
    validates: bool


def progress(file: Path) -> Progress:
    """Returns how far the run of a checkpoint had come, without reading its tensors.

    Raises:
        ValueError: If it is damaged, or holds weights alone.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        missing = {"optimizer_states", "loops", "global_step"} - set(checkpoint)
        if not missing:
            loops = checkpoint["loops"]["fit_loop"]
            epochs = loops["epoch_progress"]["current"]
            validation = loops["epoch_loop.val_loop.batch_progress"]["current"]
            return Progress(
                int(checkpoint["global_step"]),
                int(epochs["processed"]),
                epochs["started"] > epochs["processed"],
                validation["ready"] > validation["processed"],
            )
    except Exception as error:  # damaged bytes can lead the unpickler anywhere
        raise ValueError(f"{file} is no whole checkpoint ({_said(error)}).") from error
    raise ValueError(f"{file} is no whole checkpoint (it has no {', '.join(sorted(missing))}).")


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]

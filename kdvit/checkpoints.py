"""Training checkpoints on disk: written whole, and the newest of a run."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from kdvit.files import write_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: the old one stays until the new one is on the disk.

    (Lightning's own goes through the folder for temporary files, and is no rename where that is on another file system.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: If the disk is full, or cannot be written to; the message names the file.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint of a run that has come furthest, of equals ``last.ckpt``; None if there is none.

    A file that cannot be read, or from which training cannot go on, is passed over with a word.
    """
    steps = {}
    for file in sorted(folder.glob("*.ckpt"), key=lambda each: each.name == "last.ckpt", reverse=True):
        try:
            steps[file] = training_step(file)
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            rank_zero_info(f"{file} is no whole checkpoint ({str(error).split('. ')[0]}) and is passed over.")
    return max(steps, key=lambda each: steps[each]) if steps else None


def move_checkpoints(states: dict[str, Any], folder: str) -> None:
    """Rewrites, in the states of callbacks, the paths of a run's checkpoints to the folder where they are now.

    Args:
        states: State by callback; those of Lightning's ModelCheckpoint are changed.
        folder: An absolute path.
    """
    for state in states.values():
        old = state.get("dirpath")
        if old is None or old == folder:
            continue
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = state[key].replace(old, folder, 1)
        state["best_k_models"] = {path.replace(old, folder, 1): v for path, v in state["best_k_models"].items()}
        state["dirpath"] = folder


def training_step(file: Path) -> int:
    """Returns the optimizer step at which a checkpoint was saved.

    Raises:
        RuntimeError: If the file is damaged.
        ValueError: If it holds weights alone.
    """
    checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if missing := {"optimizer_states", "loops", "global_step"} - set(checkpoint):
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return int(checkpoint["global_step"])

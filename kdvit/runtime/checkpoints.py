"""Training checkpoints: written whole, when gradients are taken, and the best and last of a run."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from kdvit.errors import UserError, nearest
from kdvit.files import write_whole
from kdvit.runtime.length import is_cut, is_last_epoch

NUMBERED = "-{epoch}-{step}"


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: the old one stays until the new one is on the disk.

    (Lightning's own goes through the folder for temporary files, and is no rename where that is on another file
    system.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: If the disk is full, or cannot be written to; the message names the file.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())


class StepCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose best is the best and whose last is the last.

    * It skips batches whose gradients wait for more: a checkpoint has no gradients. (Lightning's own saves amid
      accumulated batches by time, and by steps in the first ones of a run that goes on.)
    * With `save_top_k` above 1 the files are FILENAME-epoch=E-step=S.ckpt, and FILENAME.ckpt is a copy of the best.
    * Without `monitor` it saves at the end of the run, too, whatever its interval.

    Args:
        monitor: The metric whose best is kept; null to keep the last.
        mode: Which is better, min or max; by default what the metric's name says.
        filename: Name of the file.
        save_top_k: How many to keep; -1 for all.
        kwargs: Lightning's.

    Raises:
        ValueError: If `monitor` does not say which is better, and `mode` neither.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        filename: str | None = None,
        save_top_k: int = 1,
        **kwargs: Any,
    ) -> None:
        self._alias = filename if monitor and save_top_k not in (0, 1) and "{" not in str(filename) else None
        self._copied = ""
        name = filename if self._alias is None else f"{filename}{NUMBERED}"
        which = mode or better(monitor)
        super().__init__(monitor=monitor, mode=which, filename=name, save_top_k=save_top_k, **kwargs)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises if a callback waits for a metric of the validation that has not been logged."""
        require_monitors(trainer.callbacks, trainer.callback_metrics)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises if a validation, behind which a checkpoint is saved, would come amid accumulated batches."""
        super().on_train_start(trainer, pl_module)
        every = trainer.val_check_batch
        if trainer.enable_validation and isinstance(every, int):
            over_epochs = trainer.check_val_every_n_epoch is None
            require_between_steps(every, trainer.num_training_batches, trainer.accumulate_grad_batches, over_epochs)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if it is time to."""
        if gradients_are_taken(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._copy_best(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves if it is time to."""
        super().on_validation_end(trainer, pl_module)
        self._copy_best(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves if it is time to, and at the end of the run."""
        before = self._last_global_step_saved
        if self.monitor is None or trainer.should_stop or not is_cut(trainer):  # else the score is of other weights
            super().on_train_epoch_end(trainer, pl_module)
            self._copy_best(trainer)
        due = self.monitor is None and (self.every_n_epochs == 1 or is_last_epoch(trainer))
        allowed = bool(self.save_top_k) and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if due and allowed and self._last_global_step_saved == before:  # or at the validation: now the epoch is done
            self._save_checkpoint(trainer, self.format_checkpoint_name({}))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what is the best so far, also where `save_top_k` was 1 and is more, or the other way round."""
        super().load_state_dict(state_dict)
        if not self.best_k_models or (self._alias is None and (self.filename is None or "{" in self.filename)):
            return  # nothing is known yet, or the files have names of their own
        alias = str(Path(str(self.dirpath)) / f"{self._alias or self.filename}.ckpt")
        if self._alias is not None and alias in self.best_k_models:
            kept = alias.removesuffix(".ckpt") + "-earlier.ckpt"
            if getattr(rank_zero_only, "rank", 0) == 0 and Path(alias).is_file():
                write_whole(Path(kept), Path(alias).read_bytes())
            self._know({kept if path == alias else path: score for path, score in self.best_k_models.items()})
        elif self._alias is None and alias not in self.best_k_models:
            self._know({alias: state_dict["best_model_score"]})

    def files(self, epochs: int, steps: int) -> int:
        """Returns how many files a run of so many epochs and steps leaves at most."""
        steps_apart: int = self._every_n_train_steps
        due = steps // steps_apart if steps_apart else epochs // (self.every_n_epochs or 1)
        kept = due if self.save_top_k < 0 else self.save_top_k
        return kept + (self._alias is not None)

    def _know(self, scores: dict[str, Tensor]) -> None:
        """Takes checkpoints and their scores for the best ones so far."""
        order = sorted(scores, key=lambda path: scores[path], reverse=self.mode == "max")
        self.best_k_models, self.kth_best_model_path, self.kth_value = scores, order[-1], scores[order[-1]]
        self.best_model_path, self.best_model_score = order[0], scores[order[0]]

    def _copy_best(self, trainer: pl.Trainer) -> None:
        if self._alias is not None and self.best_model_path and self.best_model_path != self._copied:
            self._copied = self.best_model_path
            if trainer.is_global_zero:
                best = Path(self.best_model_path)
                write_whole(best.with_name(f"{self._alias}.ckpt"), best.read_bytes())


def better(monitor: str | None) -> str:
    """Returns which values of a metric are better, min or max.

    Examples:
        >>> better("val/loss"), better("val/acc1_ema")
        ('min', 'max')
    """
    name = (monitor or "loss").rpartition("/")[2]
    if any(word in name for word in ("loss", "error", "nll", "mse")):
        return "min"
    if any(word in name for word in ("acc", "f1", "auroc", "cosine", "explained_variance", "r2", "map", "knn")):
        return "max"
    raise ValueError(f"checkpoint.mode: say which is better of {monitor!r}, min or max.")


def require_monitors(callbacks: Iterable[pl.Callback], logged: Iterable[str]) -> None:
    """Raises if a callback waits for a metric of the validation that nobody logs.

    Args:
        callbacks: Those of the run.
        logged: Names of the metrics that a validation has logged.

    Raises:
        UserError: If one does.
    """
    names = sorted(logged)
    for each in callbacks:
        monitor = getattr(each, "monitor", None)
        if monitor and monitor.startswith("val") and monitor not in names:
            logs = f"the validation logs {', '.join(names)}.{nearest(monitor, names)}"
            raise UserError(f"{type(each).__name__} waits for {monitor!r}, and {logs}")


def gradients_are_taken(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Tells whether the optimizer has made its step with the gradients of a training batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def require_between_steps(every: int, batches: float, accumulated: int, over_epochs: bool) -> None:
    """Raises UserError if validations come amid the batches of a step: a checkpoint saved there has no gradients.

    Args:
        every: Batches from one validation to the next.
        batches: Of an epoch; infinity for a stream.
        accumulated: Of a step.
        over_epochs: Whether the batches between validations are counted over epochs.
    """
    apart = math.gcd(every, int(batches)) if over_epochs and batches < math.inf else every
    if apart < batches and apart % accumulated:
        raise UserError(
            f"A validation after every {every} batches would come amid the {accumulated} of a step "
            "(trainer.accumulate_grad_batches), and a run that is stopped there would lose their gradients. Choose a "
            f"multiple of {accumulated} as trainer.val_check_interval{', and epochs that are one' * over_epochs}: say, "
            f"{accumulated * max(every // accumulated, 1)}."
        )


def move_checkpoints(states: dict[str, Any], folder: str) -> None:
    """Rewrites, in the states of callbacks, the paths of a run's checkpoints to the folder where they are now.

    Args:
        states: State by callback. Those of checkpoints in the run's own folder are changed; others stay elsewhere.
        folder: An absolute path.
    """
    old = next((state["dirpath"] for key, state in states.items() if key.startswith(StepCheckpoint.__name__)), folder)
    for state in states.values():
        if old == folder or not isinstance(state, dict) or state.get("dirpath") != old:
            continue
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = state[key].replace(old, folder, 1)
        state["best_k_models"] = {path.replace(old, folder, 1): v for path, v in state["best_k_models"].items()}
        state["dirpath"] = folder

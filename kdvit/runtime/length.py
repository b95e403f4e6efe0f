"""Where a run ends, and what it leaves of an epoch that is cut."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info

STOPPED_EARLY = "kdvit_stopped_early"


class RunEnd(pl.Callback):
    """Ends a run where its command says, and leaves an epoch that is cut to the run that goes on.

    (Lightning's own `max_steps` takes an epoch that is cut for a whole one, and miscounts the epochs of a run that goes
    on.)

    Args:
        steps: Steps of the optimizer, `trainer.max_steps`; None for no limit. Beside `trainer.max_epochs` it cuts the
            run. Alone it is the run's length, and a validation follows on the last step.
        has_epochs: Whether `trainer.max_epochs` limits the run.
    """

    def __init__(self, steps: int | None, has_epochs: bool) -> None:
        self.steps, self.has_epochs = steps, has_epochs
        self._stopped_early: int | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Trains nothing more where an EarlyStopping has ended the run, and says so."""
        if self._stopped_early is not None and trainer.early_stopping_callbacks:
            trainer.should_stop = True
            rank_zero_info(
                f"EarlyStopping has ended this run in epoch {self._stopped_early}, and nothing is left to train. To go "
                "on, leave it out of trainer.callbacks."
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Learns whether an EarlyStopping has ended the run, which its own state does not tell of every reason."""
        self._stopped_early = checkpoint.get(STOPPED_EARLY)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets the limit, once the progress of the run that goes on is restored.

        If that was interrupted in the validation behind its last step, the validation comes first.
        """
        loop = trainer.fit_loop.epoch_loop
        validation: Any = loop.val_loop.batch_progress.current
        if self._is_over(trainer) and validation.ready > validation.processed:
            trainer.check_val_every_n_epoch, trainer.val_check_batch = 1, loop.batch_idx + 1
        else:
            loop.max_steps = self.steps or -1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the run behind such a validation."""
        if self._is_over(trainer):
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lets Lightning validate behind the last step."""
        if self._is_over(trainer):
            trainer.should_stop, trainer.check_val_every_n_epoch = True, 1

    def _is_over(self, trainer: pl.Trainer) -> bool:
        return bool(self.steps) and not self.has_epochs and trainer.global_step >= (self.steps or 0)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Counts an epoch that is cut as begun and not as done, and notes that the run is stopped early."""
        timers = [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]
        if trainer.should_stop and trainer.early_stopping_callbacks and not timers and not self._is_over(trainer):
            checkpoint[STOPPED_EARLY] = trainer.current_epoch
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        if is_cut(trainer) and epochs["current"]["processed"] == epochs["current"]["started"]:
            for count in epochs.values():
                count["processed"] -= 1
                count["completed"] = count["processed"]


def is_cut(trainer: pl.Trainer) -> bool:
    """Tells whether the last epoch has ended, or would end now, before its last batch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return 0 < progress.current.ready < trainer.num_training_batches and not progress.is_last_batch


def is_last_epoch(trainer: pl.Trainer) -> bool:
    """Tells, at the end of an epoch, whether the run ends with it."""
    epochs = trainer.max_epochs or -1
    return trainer.should_stop or is_cut(trainer) or 0 < epochs <= trainer.current_epoch + 1

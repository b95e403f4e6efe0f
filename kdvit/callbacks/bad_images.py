"""Training images that cannot be read: which, and how many."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from kdvit.runtime.processes import gather

KEY = "bad_images"


class BadImages(pl.Callback):
    """Counts the views that another image replaced (`on_error: skip` of ImageFolder), and reports each image once.

    `train/bad_images` is their number over all ranks since the run began, where there are any. A checkpoint has it.
    """

    def __init__(self) -> None:
        self._count = 0
        self._new: dict[str, None] = {}
        self._reported: set[str] = set()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Counts those of a batch; also while a cache is written, which is a prediction."""
        bad = getattr(batch, "bad", ())
        self._count += len(bad)
        self._new |= dict.fromkeys(bad)

    on_predict_batch_start = on_train_batch_start

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Reports and logs those of the epoch."""
        self._report(trainer)
        total = sum(gather(trainer, self._count))
        if total:
            pl_module.log("train/bad_images", float(total), rank_zero_only=True)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Reports those of a cache. (All ranks come here; one without a batch calls no hook of the prediction.)"""
        if stage == "predict":
            self._report(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Saves the number of all ranks."""
        checkpoint[KEY] = sum(gather(trainer, self._count))

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restores it, on one rank."""
        self._count = checkpoint.get(KEY, 0) if trainer.is_global_zero else 0

    def _report(self, trainer: pl.Trainer) -> None:
        found = {bad: None for new in gather(trainer, list(self._new)) for bad in new}
        for bad in found:
            if bad not in self._reported:
                rank_zero_info(f"{bad} Another image takes its place.")
        self._reported.update(found)
        self._new = {}

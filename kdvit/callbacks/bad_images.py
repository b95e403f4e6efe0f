"""Training images that cannot be read: which, and how many."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info

KEY = "bad_images"


class BadImages(pl.Callback):
    """Counts the views in whose place another image came (`on_error: skip` of ImageFolder), and tells each image once.

    `train/bad_images` is their number over all ranks since the run began, where there are any. A checkpoint has it.
    """

    def __init__(self) -> None:
        self._count = 0
        self._new: dict[str, None] = {}
        self._told: set[str] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Counts those of a batch."""
        self._note(batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells and logs what came up in the epoch."""
        self._tell(trainer)
        total = self._total(trainer)
        if total:
            pl_module.log("train/bad_images", float(total), rank_zero_only=True)

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, _: int = 0) -> None:
        """Notes those of a batch, while a cache is written."""
        self._note(batch)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tells them. (Here all ranks come; those without a batch call no hook of the prediction.)"""
        if stage == "predict":
            self._tell(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves the number of all ranks."""
        checkpoint[KEY] = self._total(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Goes on with it, on one rank."""
        self._count = checkpoint.get(KEY, 0) if trainer.is_global_zero else 0

    def _note(self, batch: Any) -> None:
        bad = getattr(batch, "bad", ())
        self._count += len(bad)
        self._new |= dict.fromkeys(bad)

    def _total(self, trainer: pl.Trainer) -> int:
        if trainer.world_size == 1:
            return self._count
        count = torch.tensor(self._count, device=trainer.strategy.root_device)
        dist.all_reduce(count)
        return int(count)

    def _tell(self, trainer: pl.Trainer) -> None:
        found = [list(self._new)]
        if trainer.world_size > 1:
            found = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(found, list(self._new))
        self._new = {}
        untold = {bad: None for each in found for bad in each if bad not in self._told}
        self._told.update(untold)
        for bad in untold:
            rank_zero_info(f"{bad} Another image takes its place.")

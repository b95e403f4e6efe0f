"""Images per second."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch

from kdvit.runtime.loggers import is_logged
from kdvit.structures import as_batch


class Throughput(pl.Callback):
    """Logs `train/images_per_second` over all ranks, measured between two logged steps, validation left out."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        self._images = 0
        self._since = time.perf_counter()

    on_validation_end = on_train_start

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the batch, and logs the rate on logged steps."""
        self._images += len(as_batch(batch).image)
        if is_logged(trainer, trainer.global_step):
            rate = self._images * trainer.world_size / (time.perf_counter() - self._since)
            pl_module.log("train/images_per_second", torch.tensor(rate), prog_bar=True)  # see `log_means`
            self.on_train_start(trainer, pl_module)

"""A run of kdvit under Lightning, timed by the step."""

from __future__ import annotations

import logging
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from kdvit import DistillationModule
from kdvit.structures import Batch

EVERY = 50  # steps between two logs
WARM = 2  # steps at the start of each round that do not count, on either side


class Clock(pl.Callback):
    """Measures seconds a step."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM:
            self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seconds = (time.perf_counter() - self.start) / (trainer.num_training_batches - WARM)


def batches(batch: Batch, steps: int) -> DataLoader:
    """Yields the same batch for so many steps, and those of the start."""
    return DataLoader([batch] * (steps + WARM), batch_size=None)


def seconds_a_step(
    module: DistillationModule, loader: DataLoader, precision: str, callbacks: list[pl.Callback]
) -> float:
    """Trains one epoch."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            precision=precision,
            log_every_n_steps=EVERY,
            logger=CSVLogger(folder),
            callbacks=[*callbacks, clock],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, loader)
    return clock.seconds

"""A run of kdvit under Lightning, timed by the step."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from kdvit import DistillationModule
from kdvit.structures import Batch
from tests.bench.device import CPU, now

EVERY = 50  # steps between two logs
WARM = 2  # steps at the start of each round that do not count, on either side


class Clock(pl.Callback):
    """Measures seconds a step."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM:
            self.start = now(module.device)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seconds = (now(module.device) - self.start) / (trainer.num_training_batches - WARM)


def batches(batch: Batch, steps: int) -> DataLoader:
    """Yields the same batch for so many steps, and those of the start."""
    return DataLoader([batch] * (steps + WARM), batch_size=None)


def seconds_a_step(
    module: DistillationModule,
    data: Any,
    precision: str,
    callbacks: list[pl.Callback],
    on: torch.device = CPU,
    every: int = EVERY,
) -> float:
    """Trains one epoch of a loader or data module, with a log every so many steps."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock = Clock()
    loading = "datamodule" if isinstance(data, pl.LightningDataModule) else "train_dataloaders"
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="gpu" if on.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            precision=precision,
            log_every_n_steps=every,
            logger=CSVLogger(folder),
            callbacks=[*callbacks, clock],
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, **{loading: data})
    return clock.seconds

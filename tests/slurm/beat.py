"""What a training tells a test."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from kdvit.files import write_whole


class Beat(pl.Callback):
    """Writes the step of every batch into ``RUN/step``, and gives a batch some length.

    Args:
        seconds: To wait in each batch, a little longer on each further rank.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        time.sleep(self.seconds * (1 + 0.2 * trainer.global_rank))
        if trainer.is_global_zero:
            write_whole(Path(trainer.default_root_dir) / "step", str(trainer.global_step).encode())

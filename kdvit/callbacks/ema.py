"""An exponential moving average of the student, evaluated beside the raw weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from timm.utils import ModelEmaV3

from kdvit.errors import UserError
from kdvit.structures import Batch
from kdvit.training.metrics import classification_scores
from kdvit.training.sharding import ShardedStrategy


class StudentEMA(pl.Callback):
    """Averages the student's weights after every optimizer step, and scores the average in validation and test.

    The raw weights stay what is trained and monitored; the average's scores are `val/acc1_ema` and so on. Checkpoints
    carry the average, and `kdvit.load_student(path, ema=True)` reads it. The teacher is no part of it.

    Args:
        decay: Decay of the average, 0.99996 in the recipe of DeiT and the paper; null for no average.

    Raises:
        ValueError: If the decay is not in (0, 1).
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"ema.decay must be between 0 and 1 or null, got {decay}.")
        self.decay = decay
        self._average: ModelEmaV3 | None = None
        self._started = False

    @property
    def state_key(self) -> str:
        """The name under which checkpoints carry the average."""
        return "StudentEMA"

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Copies the student; a checkpoint's average takes its place in `load_state_dict`."""
        if self.decay is not None:
            if isinstance(trainer.strategy, ShardedStrategy):
                raise UserError(
                    "trainer.strategy sharded has no averaged student: leave ema.decay out, or set --trainer.strategy ddp."
                )
            self._average = ModelEmaV3(pl_module.student, decay=self.decay)
            self._scores = classification_scores(pl_module.num_classes)
            self._started = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Starts the average, if the sanity check has not."""
        self._start(pl_module)
        self._updated = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Starts the average, in a sanity check or without fit."""
        self._start(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Starts the average of a test."""
        self._start(pl_module)

    def _start(self, pl_module: Any) -> None:
        """Sets the average to the student's weights, restored by now, unless a checkpoint has brought an average."""
        if self._average is not None and not self._started:
            self._follow(pl_module)
            self._average.set(pl_module.student)  # type: ignore[no-untyped-call]
            self._started = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Updates the average after a step of the optimizer."""
        if self._average is not None and trainer.global_step > self._updated:
            self._updated = trainer.global_step
            self._follow(pl_module)
            self._average.update(pl_module.student)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Scores the average on one batch."""
        self._score(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Scores the average on one batch."""
        self._score(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Logs the average's scores."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Logs the average's scores."""
        self._log(pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        """Returns the average for the checkpoint."""
        return {} if self._average is None else {"student": self._average.module.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the average from a checkpoint."""
        if self._average is not None and "student" in state_dict:
            self._average.to(next(iter(state_dict["student"].values())).dtype)
            self._average.module.load_state_dict(state_dict["student"])
            self._started = True

    def _follow(self, pl_module: Any) -> None:
        if self._average is not None:  # in float32 at least, as a small step of an average is none in bfloat16
            self._average.to(pl_module.device, torch.promote_types(pl_module.dtype, torch.float32))
            self._scores.to(pl_module.device)

    @torch.no_grad()
    def _score(self, trainer: pl.Trainer, pl_module: Any, batch: Batch) -> None:
        if self._average is not None:
            self._follow(pl_module)
            with trainer.precision_plugin.forward_context():
                logits = self._average.module(batch.image.to(next(self._average.parameters()))).logits
            self._scores.update(logits, batch.target)

    def _log(self, pl_module: Any, stage: str) -> None:
        if self._average is not None:
            scores = self._scores.compute()
            pl_module.log_dict({f"{stage}/{name}_ema": value for name, value in scores.items()}, sync_dist=True)
            self._scores.reset()

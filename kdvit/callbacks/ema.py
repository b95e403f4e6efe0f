"""An exponential moving average of the student, evaluated beside the raw weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse.typing import OpenUnitInterval
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from timm.utils import ModelEmaV3

from kdvit.structures import Batch, as_batch
from kdvit.training.logs import log_objectives, log_scores


class StudentEMA(pl.Callback):
    """Averages the student's weights after every optimizer step, and scores the average in validation and test.

    The raw weights stay what is trained and monitored; the average's scores are `val/acc1_ema` and so on. Checkpoints
    carry the average, and `kdvit.load_student(path, ema=True)` reads it. The teacher is no part of it.

    Args:
        decay: Decay of the average, 0.99996 in the recipe of DeiT and the paper; null for no average.
    """

    def __init__(self, decay: OpenUnitInterval | None = None) -> None:
        self.decay = decay
        self.averages_student = decay is not None  # for the strategies that have no such average
        self._average: ModelEmaV3 | None = None
        self._started = False

    @property
    def state_key(self) -> str:
        """The name under which checkpoints carry the average."""
        return "StudentEMA"

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Copies the student; `load_state_dict` replaces the copy by a checkpoint's average."""
        if self.decay is not None:
            self._average = ModelEmaV3(pl_module.student, decay=self.decay)
            self._scores = pl_module.scores.clone()
            self._started = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Sets the average to the student's weights, restored by now, unless a checkpoint had an average."""
        self._updated = trainer.global_step
        if self._average is not None:
            # in float32 at least, as a small step of an average is none in bfloat16
            self._average.to(pl_module.device, torch.promote_types(pl_module.dtype, torch.float32))
            self._scores.to(pl_module.device)
            if not self._started:
                self._average.set(pl_module.student)  # type: ignore[no-untyped-call]
                self._started = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Starts in the sanity check too; without a fit, what has no average gets no scores of one.

        All ranks take the buffers of the first, whose average is in the checkpoints: statistics of batch norm differ.
        """
        if self._average is not None and not self._started and trainer.state.fn != TrainerFn.FITTING:
            rank_zero_warn("The student that is scored has no average of its weights, so ema.decay gives no scores.")
            self._average = None
        self.on_train_start(trainer, pl_module)
        if self._average is not None and trainer.world_size > 1:
            for buffer in self._average.module.buffers():
                torch.distributed.broadcast(buffer, 0)

    on_test_start = on_validation_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Updates the average after a step of the optimizer."""
        if self._average is not None and trainer.global_step > self._updated:
            self._updated = trainer.global_step
            self._average.update(pl_module.student)

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Scores the average on one batch."""
        if self._average is None:
            return
        batch = as_batch(batch)
        with trainer.precision_plugin.forward_context():
            if not pl_module.supervised:
                log_objectives(pl_module, self._average.module, batch, outputs, "_ema")
                return
            logits = self._average.module(batch.image.to(next(self._average.parameters()))).logits
        self._scores.update(logits, batch.target)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Logs the average's scores."""
        if self._average is not None:
            log_scores(pl_module, self._scores, "_ema")

    on_test_epoch_end = on_validation_epoch_end

    def state_dict(self) -> dict[str, Any]:
        """Returns the average for the checkpoint."""
        return {} if self._average is None else {"student": self._average.module.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the average of a checkpoint."""
        if self._average is not None and "student" in state_dict:
            self._average.to(next(iter(state_dict["student"].values())).dtype)
            self._average.module.load_state_dict(state_dict["student"])
            self._started = True

"""How good the teacher is on the data of the run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from kdvit.training.metrics import classification_scores


class TeacherScores(pl.Callback):
    """Scores the teacher once on the validation set, at the start of a run, and logs `teacher/acc1` and so on.

    A teacher far below its published accuracy has the wrong weights, input size or normalisation. A resumed run does not
    repeat it; a teacher with other classes than the data is not scored.
    """

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Runs the teacher over the validation set, each rank its share."""
        teacher = pl_module.teacher
        loader = trainer.val_dataloaders
        if teacher is None or loader is None or trainer.global_step > 0:
            return
        if teacher.output_shapes().classes != pl_module.num_classes:
            rank_zero_info("The teacher has other classes than the data, so its accuracy is not measured.")
            return
        scores = classification_scores(pl_module.num_classes).to(pl_module.device)
        limit = trainer.num_val_batches[0]
        for i, batch in enumerate(loader):
            if i >= limit:
                break
            image, target = batch.image.to(pl_module.device), batch.target.to(pl_module.device)  # never mixed
            with trainer.precision_plugin.forward_context():
                logits = teacher(image).logits
            scores.update(logits, target)
        measured = {f"teacher/{name}": float(value) for name, value in scores.compute().items()}
        for logger in trainer.loggers:
            logger.log_metrics(measured, step=0)
        rank_zero_info(f"Teacher on the validation set: {measured['teacher/acc1']:.2%} top-1.")

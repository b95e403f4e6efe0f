"""Predictions as a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kdvit.errors import UserError, shown
from kdvit.runtime.processes import gather
from kdvit.structures import as_batch


class PredictionWriter(pl.Callback):
    """Writes path, label, class and probability of every image of `kdvit predict` into ``RUN/predictions.csv``.

    The path is what the data module's ``path(index)`` says, or the index where it has none. The label is left out
    where no image has one (a target below 0 is none).

    Args:
        teacher: Add the teacher's class and probability of the same images; of several teachers, each's.
    """

    def __init__(self, teacher: bool = False) -> None:
        self.teacher = teacher

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Raises UserError if the student has no head to predict by."""
        if stage == "predict" and not getattr(pl_module, "num_classes", 1):
            raise UserError(
                "The student has no head, so it predicts no class. What its features tell of classes: kdvit probe; the "
                "features themselves: kdvit.load_student(...)(image, ['pooled'])."
            )

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Opens this rank's part of the table.

        Raises:
            UserError: If its folder cannot be made, or the teacher is asked for and cannot predict.
        """
        with shown((OSError,), prefix="trainer.default_root_dir: "):
            Path(trainer.default_root_dir).mkdir(parents=True, exist_ok=True)
        self._rows: list[tuple[int, list[str]]] = []
        teachers = pl_module.teachers.values() if self.teacher else ()
        self._teachers = [each for each in teachers if each.output_shapes().classes is not None]
        if self.teacher and not self._teachers:
            raise UserError("callbacks.predictions: teacher is true, and there is no teacher, or none with a head.")
        self._names = [each.class_names(pl_module.class_names) for each in self._teachers]

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Adds a batch's predictions."""
        names, path = pl_module.class_names, getattr(trainer.datamodule, "path", None)  # type: ignore[attr-defined]
        path = path if callable(path) else str
        batch, (index, *ours) = as_batch(batch), outputs
        columns = [[_name(names, target) for target in batch.target.tolist()], *_columns(names, *ours)]
        for teacher, theirs in zip(self._teachers, self._names, strict=True):
            with trainer.precision_plugin.forward_context():
                logits = teacher(batch.image).logits
            assert logits is not None
            probability, predicted = logits.float().softmax(dim=1).max(dim=1)
            columns += _columns(theirs, predicted, probability)
        for i, *row in zip(index.tolist(), *columns, strict=True):
            if i < 0:  # a batch of others, which does not tell: the images are dealt out by turns
                i = len(self._rows) * trainer.world_size + trainer.global_rank
            self._rows.append((i, [path(i), *row]))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Writes the table, gathered over ranks and in the order of the data set."""
        rows = sorted(row for part in gather(trainer, self._rows) for row in part)
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / "predictions.csv"
            with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:  # any path
                table = csv.writer(stream)
                head = ["path", "label", "class", "probability"]
                head += [f"{each.label}_{name}" for each in self._teachers for name in ("class", "probability")]
                known = [i for i, name in enumerate(head) if name != "label" or any(row[i] for _, row in rows)]
                table.writerows([row[i] for i in known] for row in [head, *(row for _, row in rows)])
            rank_zero_info(f"Predictions are in {file}.")


def _columns(names: Sequence[str] | None, predicted: Tensor, probability: Tensor) -> list[list[str]]:
    return [[_name(names, i) for i in predicted.tolist()], [f"{each:.6f}" for each in probability.tolist()]]


def _name(names: Sequence[str] | None, index: int) -> str:
    return "" if index < 0 else names[index] if names else str(index)

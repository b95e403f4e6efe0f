"""Predictions as a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from kdvit.errors import UserError, shown
from kdvit.runtime.processes import gather


class PredictionWriter(pl.Callback):
    """Writes path, class and probability of every image of `kdvit predict` into ``RUN/predictions.csv``.

    The path is what the data module's ``path(index)`` says, or the index where it has none.
    """

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Raises UserError if the student has no head to predict by."""
        if stage == "predict" and not getattr(pl_module, "num_classes", 1):
            raise UserError(
                "The student has no head, so it predicts no class. What its features tell of classes: kdvit probe; the "
                "features themselves: kdvit.load_student(...)(image, ['pooled'])."
            )

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Opens this rank's part of the table; raises UserError if its folder cannot be made."""
        with shown((OSError,), prefix="trainer.default_root_dir: "):
            Path(trainer.default_root_dir).mkdir(parents=True, exist_ok=True)
        self._rows: list[tuple[int, str, str, float]] = []

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Adds a batch's predictions."""
        names = pl_module.class_names or [str(i) for i in range(pl_module.num_classes)]
        path = getattr(trainer.datamodule, "path", str)  # type: ignore[attr-defined]
        for index, predicted, probability in zip(*(value.tolist() for value in outputs), strict=True):
            if index < 0:  # a batch of others, which does not tell: the images are dealt out by turns
                index = len(self._rows) * trainer.world_size + trainer.global_rank
            self._rows.append((index, path(index), names[predicted], probability))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Writes the table, gathered over ranks and in the order of the data set."""
        rows = sorted(row for part in gather(trainer, self._rows) for row in part)
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / "predictions.csv"
            with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:  # any path
                table = csv.writer(stream)
                table.writerow(["path", "class", "probability"])
                table.writerows([path, predicted, f"{probability:.6f}"] for _, path, predicted, probability in rows)
            rank_zero_info(f"Predictions are in {file}.")

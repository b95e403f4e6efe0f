"""What a run says of itself: its networks in one line and, without a terminal, a line an epoch in place of a bar."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.utilities import rank_zero_info

from kdvit.callbacks.labelled_probe import LabelledProbe
from kdvit.models.cost import parameter_count
from kdvit.structures import as_batch

SHARES = 10  # lines of a prediction
NAMES = {
    "acc1": "accuracy",
    "acc5": "top-5 accuracy",
    "knn_acc1": "k-NN accuracy",
    "linear_acc1": "linear accuracy",
}
PROBED = ("val/knn_acc1", "val/linear_acc1")


def in_words(name: str, value: float) -> str:
    """Returns a score as it is read.

    Examples:
        >>> in_words("val/knn_acc1", 0.51239), in_words("test/loss", 2.34567), in_words("test/acc1_ema", 0.5)
        ('k-NN accuracy 51.24%', 'loss 2.346', 'accuracy (EMA) 50.00%')
    """
    score, of = _score(name)
    return f"{NAMES.get(score, score)}{of} {in_figures(name, value)}"


def in_figures(name: str, value: float) -> str:
    """Returns the value of a score as it is read: a share of images in per cent."""
    return f"{value:.2%}" if _score(name)[0] in NAMES else f"{value:.4g}"


def _score(name: str) -> tuple[str, str]:
    """Returns the score of a metric's name, and in words of which weights it is."""
    score, average, _ = name.rpartition("/")[2].partition("_ema")
    return score, " (EMA)" * bool(average)


class NetworkLine(ModelSummary):
    """Says what is trained and what is frozen, in one line."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Says it."""
        objectives = parameter_count(pl_module.distillers)
        parts = [f"{type(pl_module.student).__name__} of {parameter_count(pl_module.student):,} parameters"]
        parts += [f"distillers of {objectives:,}"] * bool(objectives)
        parts += [f"{each.label} of {parameter_count(each.network):,}, frozen" for each in pl_module.teachers.values()]
        rank_zero_info(f"Networks: {'; '.join(parts)}.")


def in_terminal() -> bool:
    """Tells whether somebody watches: a bar in a file or pipe is thousands of fragments of one line."""
    return sys.stdout.isatty() and sys.stderr.isatty()


class EpochLines(ProgressBar):
    """Says after each epoch its losses, accuracy, images/s and the time that is left; of a prediction, every tenth.

    Epochs are counted from 0, as in metrics.csv. The training loss is that of the last logged step. The time is
    extrapolated from the batches since this start.
    """

    def __init__(self) -> None:
        super().__init__()
        self._validated = 0.0

    def disable(self) -> None:
        """Leaves all as it is: the other ranks say nothing anyway."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._start, self._done = time.perf_counter(), 0
        self.on_train_epoch_start(trainer, pl_module)  # which is not called amid an epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock of the epoch."""
        self._since, self._images, self._validated = time.perf_counter(), 0, 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops it."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on with it."""
        self._validated += time.perf_counter() - self._paused

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the images."""
        self._images += len(as_batch(batch).image) * trainer.world_size
        self._done += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says the line."""
        epoch, epochs = trainer.current_epoch, trainer.max_epochs or -1
        scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
        probed = any(isinstance(each, LabelledProbe) and each.is_due(epoch) for each in trainer.callbacks)  # type: ignore[attr-defined]
        validated = ["val/loss", "val/acc1", *PROBED * probed] * bool(self._validated)
        shown = [name for name in ("train/loss", *validated) if name in scores]  # the others may be of an earlier epoch
        told = [f"{name.partition('/')[0]} {in_words(name, scores[name])}" for name in shown]
        told.append(f"{self._images / max(time.perf_counter() - self._since - self._validated, 1e-9):,.0f} images/s")
        if epochs > 0 and trainer.num_training_batches != float("inf"):
            left = (epochs - epoch - 1) * trainer.num_training_batches
            seconds = (time.perf_counter() - self._start) / max(self._done, 1) * left
            told.append(f"{timedelta(seconds=round(seconds))} left")
        rank_zero_info(f"Epoch {epoch}{f' (last: {epochs - 1})' if epochs > 0 else ''}: {', '.join(told)}.")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Says how far a prediction, such as the writing of a cache, has come."""
        total = trainer.num_predict_batches[dataloader_idx]
        done = batch_idx + 1
        if total != float("inf") and done * SHARES // total > batch_idx * SHARES // total and total >= SHARES:
            rank_zero_info(f"{done:,} of {total:,} batches.")


class ScoreLine(pl.Callback):
    """Says in one line what a validation or a test has found, and on how many images."""

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Starts to count."""
        self._images = 0

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Counts the images."""
        self._images += len(as_batch(batch).image)

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Says the line."""
        images = trainer.strategy.reduce(torch.tensor(self._images, device=pl_module.device), reduce_op="sum")
        found = sorted(trainer.callback_metrics.items(), key=lambda each: each[0].endswith("_ema"))
        scores = [in_words(name, float(value)) for name, value in found]
        if trainer.is_global_zero:
            stage = "Test" if trainer.testing else "Validation"
            print(f"{stage} on {int(images):,} images: {', '.join(scores)}.")

    on_validation_start, on_validation_batch_end, on_validation_end = on_test_start, on_test_batch_end, on_test_end

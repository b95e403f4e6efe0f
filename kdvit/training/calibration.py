"""What distillers need to know of the teacher before the first step, measured once."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm

from kdvit.analysis.pca import DatasetPCA
from kdvit.analysis.tokens import as_tokens
from kdvit.distillers import Distiller
from kdvit.models import FrozenTeacher
from kdvit.training.objectives import Objectives


@torch.no_grad()
def calibrate(objectives: Objectives, teacher: FrozenTeacher | None, trainer: pl.Trainer) -> None:
    """Measures the principal axes of the teacher's tokens for each distiller that wants them and has none yet.

    The images are the first of the training loader, each rank its share; sums run over ranks in float64. A resumed run
    has the result in its checkpoint.

    Args:
        objectives: The distillers.
        teacher: The teacher; None for a supervised run.
        trainer: The Trainer, whose training is about to start.
    """
    for name, distiller in objectives.items():
        if teacher is not None and not distiller.is_calibrated():
            bases, images = _measure(distiller, teacher, trainer)
            distiller.calibrate(bases)
            said = "".join(f" {each}" for each in distiller.describe_calibration(bases))
            rank_zero_info(f"distillers.{name}: the teacher's axes are measured on {images:,} training images.{said}")


def _measure(distiller: Distiller, teacher: FrozenTeacher, trainer: pl.Trainer) -> tuple[list[Any], int]:
    device = trainer.strategy.root_device
    shapes = teacher.output_shapes(distiller.teacher_layers, logits=False).features
    metrics = [DatasetPCA(width, centred=True).to(device) for width, _, _ in shapes]
    wanted = -(-distiller.calibration_images // trainer.world_size)
    images = 0
    for batch in _batches(trainer, wanted):
        image = batch.image[: wanted - images].to(device)
        with trainer.precision_plugin.forward_context():
            features = teacher(image, distiller.teacher_layers, logits=False).features
        with torch.autocast(device.type, enabled=False):
            for metric, feature in zip(metrics, features, strict=True):
                metric.update(as_tokens(feature))
        images += len(image)
        if images >= wanted:
            break
    return [metric.compute() for metric in metrics], images * trainer.world_size


def _batches(trainer: pl.Trainer, images: int) -> Any:
    """Returns training batches of a loader of its own: the Trainer's would go on behind them."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    loader: Any = trainer.train_dataloader if data is None else data.train_dataloader()
    batches = -(-images // (getattr(loader, "batch_size", None) or 1))
    batches = min(batches, 1) if trainer.fast_dev_run else batches  # type: ignore[attr-defined]
    quiet = not trainer.is_global_zero or trainer.progress_bar_callback is None
    return tqdm(islice(loader, batches), "Calibrating", total=min(batches, len(loader)), disable=quiet, leave=False)

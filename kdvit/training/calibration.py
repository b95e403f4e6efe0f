"""What distillers need to know of the teacher before the first step, measured once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DistributedSampler
from tqdm.auto import tqdm

from kdvit.analysis.pca import DatasetPCA
from kdvit.analysis.tokens import as_tokens
from kdvit.cache import CacheError
from kdvit.distillers import Distiller
from kdvit.models import FrozenTeacher
from kdvit.structures import SharedBasis, as_batch
from kdvit.training.objectives import Objectives


@torch.no_grad()
def calibrate(
    objectives: Objectives,
    teachers: Mapping[str, FrozenTeacher],
    trainer: pl.Trainer,
    data: Any = None,
    stored: dict[str, SharedBasis] | None = None,
) -> dict[str, SharedBasis]:
    """Fixes each distiller that wants the principal axes of its teacher's tokens and has none yet.

    They are those of the run's cache, where it holds targets. Else they are measured, on the first images of the
    training loader, each rank its share; sums run over ranks in float64. A resumed run has them in its checkpoint.

    Args:
        objectives: The distillers.
        teachers: The teachers by name.
        trainer: The Trainer, whose run is about to start.
        data: The training data; by default the Trainer's.
        stored: Axes by name; by default those of the cache.

    Returns:
        All axes by name, the stored and the measured.

    Raises:
        CacheError: If a run goes on with a cache of targets that were made by other axes than its own.
    """
    data = data or trainer.datamodule  # type: ignore[attr-defined]
    bases = dict(getattr(data, "bases", {}) if stored is None else stored)
    for name, distiller in objectives.items():
        if not distiller.calibration_images:
            continue
        teacher = teachers[objectives.teacher_of[name]]
        layers = [teacher.network.canonical(layer) for layer in distiller.teacher_layers]
        whose = f"{teacher.label}, " if len(teachers) > 1 else ""  # a cache has one
        keys = [f"{whose}layer {layer}, {distiller.calibration_images} images" for layer in layers]
        known = all(key in bases for key in keys)
        if distiller.is_calibrated():
            if known:
                _require_same(name, distiller, [bases[key] for key in keys])
            continue
        source = "are those of the cache"
        if not known:
            measured, images = _measure(distiller, teacher, trainer, data)
            bases = dict(zip(keys, measured, strict=True)) | bases
            source = f"are measured on {images:,} training images"
        chosen = [bases[key] for key in keys]
        distiller.calibrate(chosen)
        said = "".join(f" {each}" for each in distiller.describe_calibration(chosen))
        rank_zero_info(f"distillers.{name}: the {teacher.label}'s axes {source}.{said}")
    return bases


def _require_same(name: str, distiller: Distiller, bases: list[SharedBasis]) -> None:
    """Raises CacheError if a checkpoint has brought another calibration than the axes of the cache give."""
    before = [buffer.clone() for buffer in distiller.buffers()]
    distiller.calibrate(bases)
    if not all(map(partial(torch.allclose, atol=1e-4), before, distiller.buffers())):
        raise CacheError(
            f"distillers.{name}: the checkpoint was trained on other axes of the teacher than those by which the cache "
            "was made. Go on with the cache that the run began with, or choose another --trainer.default_root_dir."
        )


def _measure(
    distiller: Distiller, teacher: FrozenTeacher, trainer: pl.Trainer, data: Any
) -> tuple[list[SharedBasis], int]:
    device = trainer.strategy.root_device
    shapes = teacher.output_shapes(distiller.teacher_layers, logits=False).features
    metrics = [DatasetPCA(width, centred=True).to(device) for width, _, _ in shapes]
    wanted = -(-distiller.calibration_images // trainer.world_size)
    images = 0
    for batch in _batches(trainer, data, wanted):
        image = as_batch(batch).image[: wanted - images].to(device)
        with trainer.precision_plugin.forward_context():
            features = teacher(image, distiller.teacher_layers, logits=False).features
        with torch.autocast(device.type, enabled=False):
            for metric, feature in zip(metrics, features, strict=True):
                metric.update(as_tokens(feature))
        images += len(image)
        if images >= wanted:
            break
    bases = [SharedBasis(*(part.cpu() for part in metric.compute())) for metric in metrics]
    return trainer.strategy.broadcast(bases), images * trainer.world_size


def _batches(trainer: pl.Trainer, data: Any, images: int) -> Any:
    """Returns training batches of this rank, of a loader of its own: the Trainer's would go on behind them.

    Where the data module leaves it to the Trainer to deal images out to the ranks, the loader is the Trainer's.
    """
    if trainer.train_dataloader is None:  # before the sanity check Lightning has not asked for it
        trainer.fit_loop.setup_data()
    loader: Any = trainer.train_dataloader if data is None else data.train_dataloader()
    if trainer.world_size > 1 and not isinstance(loader.sampler, DistributedSampler):
        loader = trainer.train_dataloader
    batches = -(-images // (getattr(loader, "batch_size", None) or 1))
    batches = min(batches, 1) if trainer.fast_dev_run else batches  # type: ignore[attr-defined]
    quiet = not trainer.is_global_zero or trainer.progress_bar_callback is None
    return tqdm(islice(loader, batches), "Calibrating", total=batches, disable=quiet or None, leave=False)

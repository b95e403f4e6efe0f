"""What the student's features tell of classes, while it trains without labels or with them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from kdvit.analysis.probes import (
    LabelledFeatures,
    ProbeOptions,
    ProbeScores,
    features_layer,
    features_of_images,
    probe_scores,
)
from kdvit.data import ImageDataModule
from kdvit.data.labelled import labelled_images
from kdvit.errors import shown
from kdvit.models import Network
from kdvit.structures import Layer


class LabelledProbe(pl.Callback):
    """Probes the student's features on labelled images after a validation: `val/knn_acc1` and `val/linear_acc1`.

    Each learns from their training images and is scored on their validation images; see `kdvit probe`, which does the
    same. The teachers' are logged once, at the start, as `teacher/knn_acc1` and so on. `checkpoint.monitor` can name
    either, with `every_n_epochs: 1`.

    Args:
        images: A folder, as ImageFolder reads it, or Digits or FashionMNIST; null for no probe. They come in the size
            and normalisation of the run's images.
        every_n_epochs: How often.
        k: Neighbours that vote.
        c: Inverse strength of the linear probe's penalty.
        layer: Whose mean token is the feature; by default "pooled", what the head reads, or else the last layer. So of
            a teacher that lacks the layer.
        batch_size: Images at once.
        num_workers: Processes that load them.
    """

    def __init__(
        self,
        images: str | None = None,
        every_n_epochs: PositiveInt = 1,
        k: PositiveInt = 20,
        c: PositiveFloat = 1.0,
        layer: Layer | None = None,
        batch_size: PositiveInt = 64,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        self.images, self.every_n_epochs = images, every_n_epochs
        self.options = ProbeOptions(k, c=c, layer=layer)
        self.loading = {"batch_size": batch_size, "num_workers": num_workers}
        self._data: ImageDataModule | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Finds the images."""
        if self.images is not None and stage in ("fit", "validate"):
            with shown((ValueError, TypeError, OSError, ImportError), prefix="probe.images: "):
                self._data = labelled_images(self.images, pl_module.image_format, **self.loading)
                pl_module.student.resolve(features_layer(pl_module.student, self.options.layer))
            self._data.trainer = trainer

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Probes the teachers, at the first step of a run."""
        if self._data is None or trainer.global_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for teacher in pl_module.teachers.values():
            layer = features_layer(teacher.network, self.options.layer)
            try:
                teacher.network.resolve(layer)
            except ValueError as error:
                layer = features_layer(teacher.network, None)
                rank_zero_info(f"The {teacher.label} is probed at {layer!r}: {error}")
            scores = self._probe(trainer, pl_module, self._data, teacher.network, teacher, layer)
            for logger in trainer.loggers:
                logger.log_metrics({f"{teacher.label}/{name}": value for name, value in named(scores).items()}, step=0)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Probes the student, where the epoch's turn has come; before the first step it logs zeros for the monitors."""
        if self._data is None:
            return
        before = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        fitting = trainer.state.fn == TrainerFn.FITTING and not before
        if fitting and not self.is_due(trainer.current_epoch):
            return
        scores = ProbeScores(0.0, 0.0, 0, 0, 0)
        if not before:
            layer = features_layer(pl_module.student, self.options.layer)
            scores = self._probe(trainer, pl_module, self._data, pl_module.student, pl_module.student, layer)
        pl_module.log_dict({f"val/{name}": value for name, value in named(scores).items()}, prog_bar=True)

    def is_due(self, epoch: int) -> bool:
        """Tells whether the student is probed in an epoch."""
        return self.images is not None and (epoch + 1) % self.every_n_epochs == 0

    @torch.no_grad()
    def _probe(
        self, trainer: pl.Trainer, pl_module: Any, data: ImageDataModule, network: Network, forward: Any, layer: Layer
    ) -> ProbeScores:
        """Runs `forward` (a network, or the holder that converts its images) in eval over both parts of the images."""
        found = []
        for loader in (data.plain_dataloader("train"), data.plain_dataloader("val")):
            part = None
            for batch in loader:
                with network.evaluating(), trainer.precision_plugin.forward_context():
                    features = features_of_images(forward, batch.image.to(pl_module.device), layer)
                part = part or LabelledFeatures(len(loader.sampler), features.shape[1], pl_module.device)  # type: ignore[arg-type]
                part.add(features, batch.target.to(pl_module.device))
            assert part is not None  # each rank has an image
            found.append(part)
        train, val = found
        with torch.autocast(pl_module.device.type, enabled=False):
            return probe_scores(trainer, train, val, data.num_classes, self.options)


def named(scores: ProbeScores) -> dict[str, float]:
    """Returns what is logged of a probe."""
    return {"knn_acc1": scores.knn, "linear_acc1": scores.linear}

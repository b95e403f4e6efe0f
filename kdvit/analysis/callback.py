"""The student's geometry while it trains."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from kdvit.analysis.geometry import LayerGeometry
from kdvit.analysis.layer_report import BANDWIDTH_LEVELS, LayerReport, Options, bandwidths
from kdvit.analysis.plots import figures
from kdvit.analysis.report import NetworkReport, Report
from kdvit.analysis.run import chosen_layers
from kdvit.analysis.tokens import as_tokens
from kdvit.analysis.variants import LEVEL, p99
from kdvit.models import Network
from kdvit.runtime.loggers import boards, card
from kdvit.structures import Layer, as_batch


class GeometryMonitor(pl.Callback):
    """Measures student and teacher on a few fixed validation images, so that one sees the student's bandwidth grow.

    Logs SVD rank, PCA dimension, rotation, SEP bandwidth and participation ratio of the student's last layer (or its
    remedy's map) as ``geometry/NAME``, the teacher's, measured once, as ``geometry/teacher_NAME``, and the figures of
    `kdvit analyze` to TensorBoard. The few images make ranks and dimensions smaller than those of `kdvit analyze`:
    compare epochs, not papers.

    Args:
        every_n_epochs: How often, after validation; 0 for never.
        images: Validation images, evenly spaced over the data set.
        batch_size: Images at once.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, every_n_epochs: int = 0, images: int = 64, batch_size: int = 32) -> None:
        if every_n_epochs < 0 or images < 1 or batch_size < 1:
            raise ValueError(
                "geometry: every_n_epochs must be 0 or more, images and batch_size 1 or more; got "
                f"{every_n_epochs}, {images} and {batch_size}."
            )
        self.every_n_epochs, self.images, self.batch_size = every_n_epochs, images, batch_size
        self.options = Options(permutations=20)
        self._epoch = -1
        self._share: Tensor | None = None
        self._order = torch.empty(0)
        self._teachers: list[NetworkReport] | None = None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measures and logs, where the epoch's turn has come."""
        if not self.every_n_epochs or trainer.sanity_checking:
            return
        epoch = trainer.current_epoch
        done, before = epoch + 1, epoch + 1 - (trainer.check_val_every_n_epoch or 1)  # now, at the validation before
        if done // self.every_n_epochs == before // self.every_n_epochs or epoch == self._epoch:
            return
        self._epoch = epoch  # which may have several validations
        if self._share is None:
            self._choose(trainer)
        measured = [self._measure(trainer, "student", pl_module.student, pl_module.student, pl_module.device)]
        if self._teachers is None:
            holders = pl_module.teachers.values()
            self._teachers = [self._measure(trainer, x.label, x.network, x, pl_module.device) for x in holders]
        measured += self._teachers
        for network in measured:
            prefix = "geometry/" if network.name == "student" else f"geometry/{network.name}_"
            values = scalars(network.face)
            pl_module.log_dict({f"{prefix}{name}": value for name, value in values.items()})
        self._draw(trainer, Report(measured, self.options))

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch that was measured last."""
        return {"epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on behind it."""
        self._epoch = state_dict["epoch"]

    def _choose(self, trainer: pl.Trainer) -> None:
        """Reads this rank's share of the images."""
        loaders: Any = trainer.val_dataloaders
        loader = loaders[0] if isinstance(loaders, list) else loaders
        dataset, ranks = loader.dataset, trainer.world_size
        if isinstance(dataset, IterableDataset):
            dataset = list(islice(dataset, max(self.images, ranks)))
        size = len(dataset)
        numbers = np.unique(np.linspace(0, size - 1, max(self.images, ranks)).astype(int))
        batch = loader.collate_fn([dataset[int(i)] for i in numbers[trainer.global_rank :: ranks]])
        self._share = as_batch(batch).image
        self._order = torch.from_numpy(np.argsort(np.concatenate([numbers[rank::ranks] for rank in range(ranks)])))

    @torch.no_grad()
    def _measure(
        self, trainer: pl.Trainer, name: str, network: Network, forward: Any, device: torch.device
    ) -> NetworkReport:
        """Runs `forward` (a network, or the holder that converts its images) in eval."""
        layer: Layer = chosen_layers(network, None)[-1]
        on = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64
        geometry: LayerGeometry | None = None
        assert self._share is not None
        with network.evaluating():
            for image in torch.split(trainer.precision_plugin.convert_input(self._share), self.batch_size):
                with trainer.precision_plugin.forward_context():
                    (feature,) = forward(image.to(device), (layer,), logits=False).features
                geometry = geometry or LayerGeometry(feature.shape[1], self.options).to(on)
                with torch.autocast(device.type, enabled=False):
                    geometry.update(as_tokens(feature).to(on), keep=True)
        assert geometry is not None
        geometry.find_axes()
        report = geometry.report(str(layer), network.resolve(layer), self._order)
        return NetworkReport(name, "", 0, 0, "", network.image_format, network.depth, [report], "validation", 1)

    def _draw(self, trainer: pl.Trainer, report: Report) -> None:
        for board in boards(trainer):
            for name, figure in figures(report).items():
                board.add_figure(card(f"geometry/{name}"), figure, trainer.global_step)


def scalars(layer: LayerReport) -> dict[str, float]:
    """Returns what is logged of one layer."""
    sep = bandwidths(layer)[f"{BANDWIDTH_LEVELS[-1]:g}"]
    return {
        "svd_rank_95": p99(layer.svd_rank(LEVEL)),
        "pca_dimension_95": p99(layer.pca_dimension(LEVEL)),
        "rotation": layer.rotation(LEVEL),
        "sep_90": sep["tokens"],
        "sep_90_permuted_minus_own": sep["permuted_mean"] - sep["tokens"],
        "dc_share": layer.dc_share,
        "participation": float(layer.participation.mean()),
    }

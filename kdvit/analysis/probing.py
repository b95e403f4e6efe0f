"""Networks over labelled images, once, and what their features tell of the classes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from kdvit.analysis.probes import (
    LabelledFeatures,
    ProbeOptions,
    ProbeScores,
    features_layer,
    features_of_images,
    probe_scores,
)
from kdvit.analysis.run import analysis_trainer, left_as_they_were
from kdvit.models import FrozenTeacher, Network
from kdvit.structures import Batch


class ProbeModule(pl.LightningModule):
    """Reads the features of a network on labelled images, and probes them at the end of `trainer.test`.

    Args:
        network: The network, in eval.
        data: Labelled images: an `ImageDataModule`.
        options: How to probe.

    Attributes:
        scores: What was found.
    """

    def __init__(self, network: Network, data: Any, options: ProbeOptions) -> None:
        super().__init__()
        self.layer = features_layer(network, options.layer)
        self.holder = FrozenTeacher(network, data.image_format)
        self.data, self.options = data, options.check()
        ((self.width, _, _),) = network.output_shapes((self.layer,), logits=False).features
        self.found: list[LabelledFeatures] = []
        self.scores: ProbeScores | None = None

    def test_dataloader(self) -> list[Any]:
        """Returns the images to learn from, and those held out."""
        self.data.trainer = self.trainer
        return [self.data.plain_dataloader(split) for split in ("train", "val")]

    def on_test_start(self) -> None:
        """Makes room."""
        sizes = [len(loader.sampler) for loader in self.trainer.test_dataloaders]  # type: ignore[union-attr]
        self.found = [LabelledFeatures(size, self.width, self.device) for size in sizes]

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Reads the features of a batch."""
        self.found[dataloader_idx].add(features_of_images(self.holder, batch.image, self.layer), batch.target)

    def on_test_epoch_end(self) -> None:
        """Probes, here where the processes can still talk to each other, and lets go of the features."""
        train, val = self.found
        with torch.autocast(self.device.type, enabled=False):
            self.scores = probe_scores(self.trainer, train, val, self.data.num_classes, self.options)
        self.found = []


def probe(
    network: Network, data: Any, options: ProbeOptions | None = None, trainer: pl.Trainer | None = None
) -> ProbeScores:
    """Probes what the features of a network tell of the classes of labelled images, by k-NN and a linear classifier.

    It learns from the training images, not augmented, and is scored on the validation images. The network comes back as
    it was.

    Args:
        network: The network.
        data: Labelled images: an `ImageDataModule`. The network gets them in its own size and normalisation.
        options: How to probe.
        trainer: Where to run; by default one process, on the GPU if there is one.

    Raises:
        ValueError: If there is no such layer, an image has no class, or an option is out of range.
    """
    with left_as_they_were([network]):
        module = ProbeModule(network, data, options or ProbeOptions())
        (trainer or analysis_trainer()).test(module, verbose=False)
    assert module.scores is not None
    return module.scores

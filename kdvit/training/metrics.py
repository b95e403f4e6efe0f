"""The scores of a classifier on a data set, the same for student, averaged student and teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


class CrossEntropy(Metric):
    """Mean cross-entropy of logits ``[B, K]`` against class indices ``[B]``, over all images and ranks."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Adds a batch."""
        self.total += F.cross_entropy(logits.float(), target, reduction="sum")
        self.count += target.numel()

    def compute(self) -> Tensor:
        """Returns the mean."""
        return self.total / self.count


def classification_scores(num_classes: int) -> MetricCollection:
    """Returns the metrics `acc1` and `acc5` (in 0..1) and `loss`, updated by ``(logits, target)``.

    Args:
        num_classes: Number of classes K; with fewer than 5, `acc5` is the accuracy at K.
    """
    return MetricCollection(
        {
            "acc1": MulticlassAccuracy(num_classes, average="micro"),
            "acc5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            "loss": CrossEntropy(),
        },
        compute_groups=False,
    )

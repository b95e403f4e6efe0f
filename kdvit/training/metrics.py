"""Scores of a classifier on a data set, the same for student, averaged student and teacher; means of a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
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


class StepMeans:
    """Means of what is measured in one step of the optimizer, over its accumulated batches and all ranks.

    Every batch counts alike, as in the gradient.
    """

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds a batch; each has the same names."""
        self._parts.append(values)

    def take(self, ranks: int) -> dict[str, float]:
        """Returns the means, in one read of the device, and starts anew; all ranks call it together."""
        parts, self._parts = self._parts, []
        if not parts:
            return {}
        means = torch.stack([torch.stack([value.float() for value in part.values()]) for part in parts]).mean(dim=0)
        if ranks > 1:
            dist.all_reduce(means)
            means /= ranks
        return dict(zip(parts[0], means.tolist(), strict=True))


def classification_scores(num_classes: int) -> MetricCollection:
    """Returns the metrics `acc1` and `acc5` (in 0..1) and `loss`, updated by ``(logits, target)``.

    Args:
        num_classes: Number of classes K; `acc5` comes with 6 or more, as it is 1 below. 0 makes no metric.
    """
    if not num_classes:
        return MetricCollection({})
    metrics: dict[str, Metric] = {"acc1": MulticlassAccuracy(num_classes, average="micro"), "loss": CrossEntropy()}
    if num_classes > 5:
        metrics["acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
    return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]

"""How many axes images need if each is sent to one of several bases: the ceiling of adaptive lifting.

Adaptive lifting is what the paper (arXiv:2511.15572) leaves to future work: a lift for every kind of image, and a
router. It can bring something only where images fall into kinds with subspaces of their own. Here the router sees an
image's mean token: k-means makes K clusters of these, each cluster has the principal axes of its own tokens, and the
dimension counted is that of dataset PCA, in the axes of the image's cluster. (Linear bases and this router alone: a
better router may find more.) Axes of fewer images fit these better, whatever the router. So the null sends images at
random to as many bases, each of as many images as there: what it saves, no router has earned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from kdvit.analysis.controls import Interval, interval, resampled
from kdvit.analysis.pca import moments, pca_energy, shared_basis
from kdvit.analysis.svd_rank import energy_rank
from kdvit.analysis.tokens import PerImage
from kdvit.analysis.variants import LEVEL

RESTARTS, ROUNDS = 4, 100
Part = tuple[Tensor, Tensor]
"""Tokens ``[B, N, D]`` and the numbers of their images, ``[B]``."""


class Dimensions(NamedTuple):
    """Shared axes that hold 95 % of an image's energy, over the images.

    Attributes:
        p99: 99th percentile, with its 95 % bootstrap interval over images, the axes held fixed.
        median: Median.
    """

    p99: Interval
    median: float


class Routed(NamedTuple):
    """What images need that are routed to several bases.

    Attributes:
        bases: How many, K.
        by_mean_token: Routed by their mean token.
        at_random: Routed at random, to bases of as many images each.
    """

    bases: int
    by_mean_token: Dimensions
    at_random: Dimensions


class ClusterMoments(Metric):
    """The sums of ``x x^T`` over the tokens of each cluster of images, over all batches and ranks."""

    full_state_update = False
    moment: Tensor

    def __init__(self, clusters: int, width: int) -> None:
        super().__init__()
        self.add_state("moment", torch.zeros(clusters, width, width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor, labels: Tensor) -> None:
        """Adds images by their tokens ``[B, N, D]`` and clusters ``[B]``."""
        for label, mine in _by_cluster(labels):
            self.moment[label] += moments(tokens[mine])[0]

    def compute(self) -> Tensor:
        """Returns the sums, ``[K, D, D]``."""
        return self.moment


def routed_dimensions(parts: Sequence[Part], bases: int, seed: int = 0) -> list[Routed]:
    """Returns what images need that are routed to 1, 2, 4 and so on up to K bases, together with all ranks.

    Args:
        parts: This rank's images.
        bases: The largest K.
        seed: Of the clusters, the random routing and the resamples.

    Raises:
        ValueError: If there are fewer images than bases.
    """
    mean = _gathered([tokens.double().mean(1) for tokens, _ in parts])
    numbers = _gathered([number for _, number in parts])
    if bases > len(mean):
        raise ValueError(f"subspaces: {bases} bases need as many images or more, got {len(mean)}.")
    order = numbers.argsort()
    generator = torch.Generator().manual_seed(seed)

    def dimensions(labels: Tensor) -> Dimensions:
        found = _dimensions(parts, labels.to(mean.device), numbers[order], order)
        (every,) = resampled(np.random.default_rng(seed), found)
        return Dimensions(interval(np.percentile(every, 99, axis=1)), float(np.median(found)))

    routed = []
    for count in sorted({*(2**i for i in range(bases.bit_length())), bases}):
        labels = cluster(mean[order].cpu(), count, generator)
        by_mean = dimensions(labels)
        shuffled = labels[torch.randperm(len(labels), generator=generator)]
        routed.append(Routed(count, by_mean, dimensions(shuffled) if count > 1 else by_mean))
    return routed


def cluster(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns the clusters of points by k-means (k-means++, the best of 4 starts).

    Args:
        points: ``[P, D]``.
        count: Clusters, K.
        generator: On the CPU.

    Returns:
        Cluster of each point, ``[P]``, in 0..K-1.

    Examples:
        >>> cluster(torch.tensor([[0.0], [9.0], [0.1], [9.1]]), 2, torch.Generator().manual_seed(0)).diff().tolist()
        [1, -1, 1]
    """
    starts = [_cluster(points, count, generator) for _ in range(RESTARTS)]
    return min(starts, key=lambda start: start[0])[1]


def _cluster(points: Tensor, count: int, generator: torch.Generator) -> tuple[float, Tensor]:
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(count - 1):
        far = torch.cdist(points, centres).amin(1).square()
        drawn = torch.multinomial(far if far.any() else far + 1, 1, generator=generator)
        centres = torch.cat([centres, points[drawn]])
    labels = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        distance, nearest = torch.cdist(points, centres).min(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        for label, mine in _by_cluster(labels):
            centres[label] = points[mine].mean(0)
    return float(distance.square().sum()), labels


def _by_cluster(labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    return ((label, labels == label) for label in sorted({*labels.tolist()}))


def _dimensions(parts: Sequence[Part], labels: Tensor, numbers: Tensor, order: Tensor) -> NDArray[np.int64]:
    """Returns the dimension of every image in the axes of its cluster, ``[images]``, in the order of the numbers."""
    width = parts[0][0].shape[2]
    metric = ClusterMoments(int(labels.max()) + 1, width).to(labels.device)
    mine = [(tokens, labels[torch.searchsorted(numbers, number)]) for tokens, number in parts]
    for tokens, own in mine:
        metric.update(tokens, own)
    moment = metric.compute()
    axes = [shared_basis(each, each.new_zeros(width), 1) for each in moment]
    found = [torch.empty(len(own), dtype=torch.int64, device=own.device) for _, own in mine]
    for (tokens, own), dimension in zip(mine, found, strict=True):
        for label, images in _by_cluster(own):
            dimension[images] = energy_rank(pca_energy(tokens[images], axes[label]), LEVEL)
    return _gathered(found)[order].cpu().numpy()


def _gathered(rows: Sequence[Tensor]) -> Tensor:
    metric = PerImage().to(rows[0].device)
    for each in rows:
        metric.update(each)
    return metric.compute()

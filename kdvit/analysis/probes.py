"""What frozen features tell of classes: k nearest neighbours, and a linear classifier, on labelled images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.models import Network
from kdvit.runtime.processes import gather
from kdvit.structures import Layer

QUERIES, ROWS = 256, 8192
"""Images at once: those that neighbours are sought for, and those of a gradient."""
ITERATIONS, HISTORY = 300, 10
"""Of L-BFGS."""


class ProbeOptions(NamedTuple):
    """How features are probed.

    Attributes:
        k: Neighbours that vote, each by ``exp(cosine / temperature)`` (Wu et al., arXiv:1805.01978); 20 as in DINO.
        temperature: Of the votes; 0.07 in both.
        c: Inverse strength of the linear probe's penalty, as in scikit-learn's LogisticRegression.
        layer: The features: the mean token of a layer; by default "pooled", what the network's head reads, or of a
            network without it the last layer.

    Raises:
        ValueError: By `check`, if a number is out of range.
    """

    k: int = 20
    temperature: float = 0.07
    c: float = 1.0
    layer: Layer | None = None

    def check(self) -> ProbeOptions:
        """Returns the options, if they can be."""
        if self.k < 1 or self.temperature <= 0 or self.c <= 0:
            raise ValueError(
                f"probe: k must be 1 or more, temperature and c above 0; got {self.k}, {self.temperature} and {self.c}."
            )
        return self


class ProbeScores(NamedTuple):
    """What a probe found.

    Attributes:
        knn: Share of the held-out images that the neighbours class rightly, 0..1.
        linear: The same of the linear classifier.
        train: Images that were learned from.
        val: Held-out images.
        width: Numbers of a feature.
    """

    knn: float
    linear: float
    train: int
    val: int
    width: int


class LabelledFeatures:
    """Features of this rank's share of some images, held once.

    Args:
        images: How many there will be.
        width: Numbers of each.
        device: Where they are held.
    """

    def __init__(self, images: int, width: int, device: torch.device | str = "cpu") -> None:
        self._features = torch.empty(images, width, device=device)
        self._targets = torch.empty(images, dtype=torch.int64, device=device)
        self.count = 0

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Adds features ``[B, D]`` with the classes ``[B]`` of their images.

        Raises:
            ValueError: If an image has no class, or a feature is not finite.
        """
        if targets.ndim != 1 or bool((targets < 0).any()):
            raise ValueError("A probe needs images with one class each, and there are some without.")
        if not bool(features.isfinite().all()):
            raise ValueError("The features of an image are not finite: there is nothing to probe.")
        rows = slice(self.count, self.count + len(targets))
        self._features[rows], self._targets[rows] = features, targets
        self.count = rows.stop

    @property
    def features(self) -> Tensor:
        """Those so far, ``[n, D]``, float32."""
        return self._features[: self.count]

    @property
    def targets(self) -> Tensor:
        """Their classes, ``[n]``."""
        return self._targets[: self.count]

    def parts(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields features and classes of so many images at once."""
        return zip(torch.split(self.features, rows), torch.split(self.targets, rows), strict=True)


def features_layer(network: Network, layer: Layer | None) -> Layer:
    """Returns the layer that is probed; see `ProbeOptions`."""
    return layer if layer is not None else "pooled" if "pooled" in network.token_layers() else -1


def features_of_images(forward: Any, image: Tensor, layer: Layer) -> Tensor:
    """Returns the mean tokens ``[B, D]`` of a layer, float32.

    Args:
        forward: A network, or the holder that converts its images.
        image: ``[B, C, H, W]``.
        layer: The layer.
    """
    if isinstance(forward, Network):
        image = image.to(next(forward.parameters()).dtype)
    (feature,) = forward(image, (layer,), logits=False).features
    return feature.float().mean(dim=(2, 3))  # type: ignore[no-any-return]


def nearest(bank: LabelledFeatures, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds neighbours by the cosine.

    Args:
        bank: Where they are sought.
        queries: ``[B, D]``.
        k: How many; no more than there are.

    Returns:
        Cosines ``[B, k]``, the largest first, and classes ``[B, k]``.
    """
    lengths = bank.features.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    cosines, index = (F.normalize(queries) @ bank.features.T / lengths).topk(min(k, bank.count))
    return cosines, bank.targets[index]


def votes(cosines: Tensor, classes: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Returns the share of each class in the sum of ``exp(cosine / temperature)`` of the neighbours, ``[B, K]``."""
    empty = cosines.new_zeros(len(cosines), num_classes)
    return empty.scatter_add(1, classes, (cosines / temperature).softmax(dim=1))


def knn_hits(
    trainer: pl.Trainer, bank: LabelledFeatures, held_out: LabelledFeatures, num_classes: int, options: ProbeOptions
) -> int:
    """Counts this rank's images that their neighbours, of all ranks, class rightly; all ranks call it together."""
    rounds = max(gather(trainer, -(-held_out.count // QUERIES)))
    hits = 0
    for i in range(rounds):
        rows = slice(i * QUERIES, (i + 1) * QUERIES)
        queries, targets = held_out.features[rows], held_out.targets[rows]
        if trainer.world_size > 1:
            asked = [each.to(queries.device) for each in gather(trainer, queries.cpu())]
            answers = [tuple(part.cpu() for part in nearest(bank, each, options.k)) for each in asked]
            ours = [every[trainer.global_rank] for every in gather(trainer, answers)]
            cosines, classes = (torch.cat(parts, dim=1).to(queries.device) for parts in zip(*ours, strict=True))
            cosines, index = cosines.topk(min(options.k, cosines.shape[1]))
            classes = classes.gather(1, index)
        else:
            cosines, classes = nearest(bank, queries, options.k)
        hits += int((votes(cosines, classes, num_classes, options.temperature).argmax(dim=1) == targets).sum())
    return hits


class LinearProbe(NamedTuple):
    """A linear classifier of standardised features.

    Attributes:
        weight: ``[K, D]``.
        bias: ``[K]``.
        mean: ``[D]``.
        std: ``[D]``; 1 where a feature is constant.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Returns the logits ``[B, K]`` of features ``[B, D]``."""
        return (features - self.mean) / self.std @ self.weight.T + self.bias


def fit_linear(trainer: pl.Trainer, train: LabelledFeatures, num_classes: int, c: float) -> LinearProbe:
    """Fits multinomial logistic regression to the features of all ranks, by L-BFGS.

    Minimised is the mean cross-entropy plus ``|weight|^2 / (2 c n)``, which is scikit-learn's LogisticRegression(C=c)
    on features that are standardised by the n training images. The gradient is summed over ranks, so that features stay
    where they are, and each rank comes to the same classifier.

    Args:
        trainer: The Trainer, whose ranks all call it together.
        train: This rank's share.
        num_classes: K.
        c: Inverse strength of the penalty.
    """
    features = train.features
    width, count = features.shape[1], int(_sum(trainer, torch.tensor(float(train.count), device=features.device)))
    mean = _sum(trainer, features.sum(dim=0)) / count
    squares = sum(((part - mean).square().sum(dim=0) for part, _ in train.parts(ROWS)), torch.zeros_like(mean))
    std = (_sum(trainer, squares) / count).sqrt()
    # a float32 mean of equal numbers is that number but for rounding, which is no deviation
    std = torch.where(std > 1e-6 * mean.abs(), std, 1)
    numbers = torch.zeros(num_classes * (width + 1), device=features.device)
    weight, bias = numbers[: num_classes * width].view(num_classes, width), numbers[num_classes * width :]
    probe = LinearProbe(weight, bias, mean, std)

    @torch.no_grad()
    def step() -> Tensor:
        totals = torch.zeros(1 + len(numbers), device=features.device)
        for part, targets in train.parts(ROWS):
            logits = probe.logits(part)
            totals[0] += F.cross_entropy(logits, targets, reduction="sum")
            slope = logits.softmax(dim=1) - F.one_hot(targets, num_classes)
            totals[1:] += torch.cat([(slope.T @ ((part - mean) / std)).flatten(), slope.sum(dim=0)])
        totals = _sum(trainer, totals) / count
        numbers.grad = totals[1:].clone()
        numbers.grad[: weight.numel()] += weight.flatten() / (c * count)
        return totals[0] + weight.square().sum() / (2 * c * count)

    options: dict[str, Any] = {"max_iter": ITERATIONS, "history_size": HISTORY, "line_search_fn": "strong_wolfe"}
    solver: Any = torch.optim.LBFGS([numbers], tolerance_grad=1e-5, tolerance_change=1e-7, **options)
    solver.step(step)
    return probe


def probe_scores(
    trainer: pl.Trainer, train: LabelledFeatures, val: LabelledFeatures, num_classes: int, options: ProbeOptions
) -> ProbeScores:
    """Probes the features of all ranks; all ranks call it together."""
    linear = fit_linear(trainer, train, num_classes, options.c)
    right = sum(int((linear.logits(part).argmax(dim=1) == targets).sum()) for part, targets in val.parts(ROWS))
    ours = [knn_hits(trainer, train, val, num_classes, options), right, train.count, val.count]
    knn, right, learned, held_out = (sum(every) for every in zip(*gather(trainer, ours), strict=True))
    return ProbeScores(knn / held_out, right / held_out, learned, held_out, train.features.shape[1])


def _sum(trainer: pl.Trainer, ours: Tensor) -> Tensor:
    total: Tensor = trainer.strategy.reduce(ours, reduce_op="sum")
    return total

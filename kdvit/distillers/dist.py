"""Distillation from a stronger teacher by correlations (DIST, arXiv:2205.10536)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from kdvit.distillers.logit import LogitObjective
from kdvit.distillers.weights import Weight
from kdvit.structures import ViTOutput, at_least_float32


def pearson_distance(one: Tensor, other: Tensor) -> Tensor:
    """One minus Pearson's correlation of the rows of two matrices ``[M, N]``, averaged over the rows."""
    one, other = (x - x.mean(dim=1, keepdim=True) for x in (one, other))
    return 1 - F.cosine_similarity(one, other, dim=1).mean()


def dist(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Correlation distance of class probabilities, within each image and within each class (equations 8 to 10).

    ``temperature^2 * (beta * inter + gamma * intra)``: inter compares rows (the classes of an image), intra columns
    (the images of a class).

    Args:
        student: Logits ``[B, K]``.
        teacher: Logits ``[B, K]``.
        beta: Weight of the rows.
        gamma: Weight of the columns.
        temperature: Divides both logits.
    """
    ours, theirs = ((logits / temperature).softmax(dim=1) for logits in map(at_least_float32, (student, teacher)))
    inter, intra = pearson_distance(ours, theirs), pearson_distance(ours.T, theirs.T)
    return temperature**2 * (beta * inter + gamma * intra)


class DISTDistiller(LogitObjective):
    """DIST: the student's probabilities correlate with the teacher's, in each image and in each class.

    A correlation's gradient grows as one over the spread of the student's logits. Where a head begins at zero (timm's
    `weight_init: jax`, ResMLP, Hiera), clip it, or the first step spoils Adam's averages for the head:
    ``--trainer.gradient_clip_val 1``.

    Args:
        weight: Factor of this term in the total loss.
        beta: Weight of the correlations in each image; 2 in the paper's ImageNet runs.
        gamma: Weight of the correlations in each class over the batch; 2 in the paper's ImageNet runs.
        temperature: Softens both distributions; 1 for ImageNet in the paper, 4 for CIFAR-100.
        kwargs: Those of LogitObjective.

    Raises:
        ValueError: If a number is out of range; at `build`, if student and teacher have different classes.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(weight, temperature, **kwargs)
        if beta < 0 or gamma < 0:
            raise ValueError(f"DISTDistiller: beta and gamma must be 0 or more, got {beta} and {gamma}.")
        self.beta, self.gamma = beta, gamma

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Returns `dist` of the logits."""
        return dist(*self.logits(student, teacher), self.beta, self.gamma, self.temperature)

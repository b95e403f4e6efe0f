"""Relational knowledge distillation (RKD, arXiv:1904.05068)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.distillers.base import Distiller
from kdvit.distillers.weights import Weight
from kdvit.structures import Layer, ViTOutput

NOTHING = 1e-5
"""Times the mean distance: what is nearer is equal."""


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the distances of all pairs of images, each network's divided by their mean (equations 4 to 6).

    Args:
        student: One vector an image, ``[B, D_s]``.
        teacher: ``[B, D_t]``.
    """
    ours, theirs = (torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") for x in (student, teacher))
    ours, theirs = (x * (x > 0).sum() / x.sum().clamp(min=1e-12) for x in (ours, theirs))
    return F.smooth_l1_loss(ours, theirs)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles of all triples of images (equations 7 and 8).

    Images that are equal but for rounding have no direction between them, and no gradient: it would be its inverse.

    Args:
        student: One vector an image, ``[B, D_s]``.
        teacher: ``[B, D_t]``.
    """
    ours, theirs = (x @ x.mT for x in map(_directions, (student, teacher)))
    return F.smooth_l1_loss(ours, theirs)


def _directions(x: Tensor) -> Tensor:
    edge = x[None] - x[:, None]
    length = edge.detach().norm(dim=2, keepdim=True)
    return F.normalize(edge.where(length > NOTHING * length.mean(), 0), dim=2)


class RKDDistiller(Distiller):
    """RKD: distances and angles between the images of a batch, in mean tokens. Widths and grids may differ.

    Args:
        weight: Factor of this term in the total loss.
        distance: Weight of the distances; 25 in the paper's classification runs.
        angle: Weight of the angles; 50 in the paper's classification runs.
        student_layer: Layer of the student whose tokens are averaged.
        teacher_layer: The same for the teacher.
        teacher: Name of the teacher, where there are several.

    Raises:
        ValueError: If a weight is negative.
    """

    needs_teacher_logits: ClassVar[bool] = False

    def __init__(
        self,
        weight: Weight = 1.0,
        distance: float = 25.0,
        angle: float = 50.0,
        student_layer: Layer = -1,
        teacher_layer: Layer = -1,
        teacher: str | None = None,
    ) -> None:
        super().__init__(weight, teacher)
        if distance < 0 or angle < 0:
            raise ValueError(f"RKDDistiller: distance and angle must be 0 or more, got {distance} and {angle}.")
        self.distance, self.angle = distance, angle
        self.student_layers, self.teacher_layers = (student_layer,), (teacher_layer,)

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Returns the weighted sum of `distance_loss` and `angle_loss`."""
        pair = student.features[0].mean((2, 3)), teacher.features[0].mean((2, 3))
        return self.distance * distance_loss(*pair) + self.angle * angle_loss(*pair)

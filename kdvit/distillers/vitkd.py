"""ViTKD: shallow layers are mimicked, the deep one is generated from a part of it (arXiv:2209.02432)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.distillers.base import Distiller
from kdvit.distillers.feature import layer_normed, same_grid
from kdvit.distillers.weights import Weight
from kdvit.structures import Layer, OutputShapes, ViTOutput


class ViTKDDistiller(Distiller):
    """ViTKD: shallow maps through linear maps; the teacher's last map generated where the student's is masked.

    ``alpha * mimicking + beta / masked * generation``. Mimicking: the squared error of each shallow map behind a linear
    map to the teacher's width. Generation: tokens of the student's deep map, behind such a map too, are replaced by one
    learnt token; two convolutions of 3 x 3 with a ReLU between make the teacher's of it; the squared error counts at
    the replaced tokens. Errors are summed over tokens and channels and averaged over the batch, so that alpha and beta
    are those of 196 tokens of a few hundred channels: on smaller maps, raise `weight`. The linear maps, the token and
    the convolutions are trained, and gone at inference; where the widths agree there are no linear maps.

    Defaults and formula are those of the authors' code (github.com/yzd-v/cls_KD, DeiT-Tiny from DeiT3-Small). It reads
    the deep maps behind the final norms; here LayerNorm without affine part stands for these on both sides.

    The masked tokens are drawn from torch's global generator.

    Args:
        weight: Factor of this term in the total loss.
        student_layers: Layers of the student; the last is the deep one.
        teacher_layers: Layers of the teacher, one for each of `student_layers`.
        alpha: Weight of the mimicking.
        beta: Weight of the generation.
        masked: Share of the deep map's tokens that are masked.
        teacher: Name of the teacher, where there are several.

    Raises:
        ValueError: If the lists differ in length or have fewer than two layers, or a number is out of range.
    """

    needs_teacher_logits: ClassVar[bool] = False

    def __init__(
        self,
        weight: Weight = 1.0,
        student_layers: Sequence[Layer] = (0, 1, -1),
        teacher_layers: Sequence[Layer] = (0, 1, -1),
        alpha: float = 3e-5,
        beta: float = 3e-6,
        masked: float = 0.5,
        teacher: str | None = None,
    ) -> None:
        super().__init__(weight, teacher)
        if len(student_layers) != len(teacher_layers) or len(student_layers) < 2:
            raise ValueError(
                "ViTKDDistiller: student_layers and teacher_layers are pairs, the shallow ones and then the deep one, "
                f"and must be lists of one length of 2 or more; got {list(student_layers)} and {list(teacher_layers)}."
            )
        if alpha < 0 or beta < 0 or not 0 < masked < 1:
            raise ValueError(
                "ViTKDDistiller: alpha and beta must be 0 or more, and masked between 0 and 1; got "
                f"{alpha}, {beta} and {masked}."
            )
        self.student_layers, self.teacher_layers = tuple(student_layers), tuple(teacher_layers)
        self.alpha, self.beta, self.masked = alpha, beta, masked

    def build(self, student: OutputShapes, teacher: OutputShapes) -> None:
        """Creates what is trained."""
        widths = [(ours[0], theirs[0]) for ours, theirs in zip(student.features, teacher.features, strict=True)]
        self.projectors = nn.ModuleList(
            nn.Identity() if ours == theirs else nn.Conv2d(ours, theirs, kernel_size=1) for ours, theirs in widths
        )
        width = widths[-1][1]
        self.mask_token = nn.Parameter(torch.zeros(width, 1, 1))
        self.generator = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
        )

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Returns the weighted sum of mimicking and generation."""
        pairs = [same_grid(ours, theirs) for ours, theirs in zip(student.features, teacher.features, strict=True)]
        *shallow, (ours, theirs) = pairs
        batch = len(ours)
        errors = [
            F.mse_loss(project(x), wanted, reduction="sum")
            for project, (x, wanted) in zip(list(self.projectors)[:-1], shallow, strict=True)
        ]
        ours, theirs = self.projectors[-1](layer_normed(ours)), layer_normed(theirs)
        mask = self.draw_mask(ours)
        generated = self.generator(torch.where(mask, self.mask_token, ours))
        missed = ((generated - theirs).square() * mask).sum()
        loss: Tensor = (self.alpha * torch.stack(errors).sum() + self.beta / self.masked * missed) / batch
        return loss

    def draw_mask(self, feature: Tensor) -> Tensor:
        """Returns which tokens of a map ``[B, C, H, W]`` are masked, as many in each image, ``[B, 1, H, W]``."""
        batch, _, height, width = feature.shape
        tokens = height * width
        rank = torch.rand(batch, tokens, device=feature.device).argsort(dim=1).argsort(dim=1)
        return (rank >= int(tokens * (1 - self.masked))).view(batch, 1, height, width)

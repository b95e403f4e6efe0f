"""Distillation of relations within a map, which asks for no equal widths: attention, and similarities of tokens."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from kdvit.distillers.base import Distiller
from kdvit.distillers.feature import same_grid
from kdvit.distillers.weights import Weight
from kdvit.structures import Layer, OutputShapes, ViTOutput, at_least_float32


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the maps of mean squared activation, each of length 1 (arXiv:1612.03928, equation 2).

    Args:
        student: ``[B, C_s, H, W]``.
        teacher: ``[B, C_t, H, W]``.
    """
    ours, theirs = (
        F.normalize(x.square().mean(1).flatten(1), dim=1) for x in map(at_least_float32, (student, teacher))
    )
    return F.mse_loss(ours, theirs)


def token_relations(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosine similarities of all pairs of an image's tokens (DINOv3's Gram loss).

    Args:
        student: ``[B, C_s, H, W]``.
        teacher: ``[B, C_t, H, W]``.
    """
    ours, theirs = (F.normalize(x.flatten(2), dim=1) for x in map(at_least_float32, (student, teacher)))
    return F.mse_loss(ours.mT @ ours, theirs.mT @ theirs)


class RelationDistiller(Distiller):
    """What the relations of a map's tokens have in common: one layer of each network, the finer grid resized.

    Args:
        weight: Factor of this term in the total loss.
        student_layer: Layer of the student.
        teacher_layer: Layer of the teacher.
        teacher: Name of the teacher, where there are several.

    Raises:
        ValueError: At `build`, if a map has one token, as "pooled" has.
    """

    needs_teacher_logits: ClassVar[bool] = False

    def __init__(
        self,
        weight: Weight = 1.0,
        student_layer: Layer = -1,
        teacher_layer: Layer = -1,
        teacher: str | None = None,
    ) -> None:
        super().__init__(weight, teacher)
        self.student_layers, self.teacher_layers = (student_layer,), (teacher_layer,)

    def build(self, student: OutputShapes, teacher: OutputShapes) -> None:
        """Checks that there are tokens to relate."""
        for whose, shapes, (layer,) in (
            ("student", student, self.student_layers),
            ("teacher", teacher, self.teacher_layers),
        ):
            if shapes.features[0][1:] == (1, 1):
                raise ValueError(
                    f"{type(self).__name__}: the {whose}'s layer {layer!r} has one token an image, which has no other "
                    "to relate to. Take a block; for relations of images by one vector each take RKDDistiller."
                )


class AttentionTransferDistiller(RelationDistiller):
    """Attention transfer: where in the image the activations are strong. Widths may differ.

    The weight is about 1,000 in the paper, as the loss is small.
    """

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Returns `attention_transfer` of the pair."""
        return attention_transfer(*same_grid(student.features[0], teacher.features[0]))


class TokenRelationDistiller(RelationDistiller):
    """Token relations: which tokens of an image are alike. Widths may differ: natural under an encoding mismatch."""

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Returns `token_relations` of the pair."""
        return token_relations(*same_grid(student.features[0], teacher.features[0]))

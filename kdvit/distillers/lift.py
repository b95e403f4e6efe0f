"""Distillation of the lifted map of a LiftViT (arXiv:2511.15572, Lift)."""

from __future__ import annotations

from kdvit.distillers.feature import FeatureDistiller, Loss, Normalize
from kdvit.distillers.weights import Weight
from kdvit.structures import Layer


class LiftDistiller(FeatureDistiller):
    """Lift: the lifted map of a LiftViT, projector and norm included, against the teacher's block output.

    Checks the student's architecture and never makes it: the lifting projector is part of LiftViT and stays at
    inference.

    Args:
        weight: Factor of this term in the total loss; 0.2 in the paper's runs.
        loss: "mse", "smooth_l1", or "spectral" for SpectralKD; the paper's best Lift run takes "spectral".
        teacher_layer: Layer of the teacher, before its final norm; the last block in the paper.
        teacher: Name of the teacher, where there are several.
        normalize: See FeatureDistiller; "layer_norm" for a teacher with sink tokens.

    Raises:
        ValueError: At construction of the run, if the student has no lift or is not as wide as the teacher.
    """

    way_out = "Set the width of LiftViT to {width}."

    def __init__(
        self,
        weight: Weight = 1.0,
        loss: Loss = "mse",
        teacher_layer: Layer = -1,
        teacher: str | None = None,
        normalize: Normalize | None = None,
    ) -> None:
        super().__init__(weight, ("lift",), (teacher_layer,), loss, normalize=normalize, teacher=teacher)

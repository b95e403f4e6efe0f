"""Distillation of the wide last block of a WideLastViT (arXiv:2511.15572, WideLast)."""

from __future__ import annotations

from kdvit.distillers.feature import FeatureDistiller, Loss, Normalize
from kdvit.distillers.weights import Weight
from kdvit.structures import Layer


class WideLastDistiller(FeatureDistiller):
    """WideLast: the output of the wide last block of a WideLastViT against the teacher's block output.

    Checks the student's architecture and never makes it: the wide block is part of WideLastViT and stays at inference.

    Args:
        weight: Factor of this term in the total loss; 0.2 in the paper's runs.
        loss: "mse", as in the paper's best WideLast run, "smooth_l1", or "spectral" for SpectralKD.
        teacher_layer: Layer of the teacher, before its final norm; the last block in the paper.
        teacher: Name of the teacher, where there are several.
        normalize: See FeatureDistiller; "layer_norm" for a teacher with sink tokens.

    Raises:
        ValueError: At construction of the run, if the student has no wide last block or it is not as wide as the
            teacher.
    """

    way_out = "Set the width of WideLastViT to {width}."

    def __init__(
        self,
        weight: Weight = 1.0,
        loss: Loss = "mse",
        teacher_layer: Layer = -1,
        teacher: str | None = None,
        normalize: Normalize | None = None,
    ) -> None:
        super().__init__(weight, ("wide_last",), (teacher_layer,), loss, normalize=normalize, teacher=teacher)

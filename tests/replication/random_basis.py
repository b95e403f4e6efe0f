"""Feature distillation to a random orthogonal projection of the teacher, which any fixed basis has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kdvit.distillers import FeatureDistiller
from kdvit.distillers.bases import FixedProjection
from kdvit.structures import SharedBasis


class RandomBasis(FeatureDistiller):
    """As ``projector: pca``, centred and with the mean variance 1, but on axes drawn at random, the same for all seeds.

    Args:
        kwargs: Those of FeatureDistiller, but for `projector`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(projector="pca", **kwargs)

    def calibrate(self, bases: Sequence[SharedBasis]) -> None:
        """Fixes the projection on random axes."""
        for basis, projection in zip(bases, self.projectors, strict=True):
            assert isinstance(projection, FixedProjection)
            drawn = torch.randn(len(basis.mean), projection.width, generator=torch.Generator().manual_seed(0))
            axes = torch.linalg.qr(drawn.to(basis.axes)).Q
            variance = (basis.axes.T @ axes).square().T @ basis.spectrum  # of each axis
            projection.fix(basis.mean, axes / variance.mean().sqrt())

    def describe_calibration(self, bases: Sequence[SharedBasis]) -> list[str]:
        """Says nothing, for what would be said is true of the leading axes."""
        return []

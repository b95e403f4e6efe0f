"""How near a student's map is to its target: measured for the logs, and no loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def agreement(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Measures the cosine similarity of tokens, and what share of the target's variance is explained.

    `explained_variance` forgives a constant offset of each channel; `r2` counts it (one minus the squared error over
    the target's variance, both summed over the channels). In both, a channel counts by its variance, so that a giant
    one hides the rest; `r2_median` is the median of the channels' own R^2, and hides as little as half of them can.

    Args:
        student: ``[B, C, H, W]``.
        teacher: ``[B, C, H, W]``, the target.
    """
    cosine = F.cosine_similarity(student, teacher, dim=1).mean()
    ours, theirs = (x.movedim(1, -1).flatten(0, -2) for x in (student, teacher))
    explained, whole, median = scores(ours, theirs)
    return {"cosine": cosine, "explained_variance": explained, "r2": whole, "r2_median": median}


def scores(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns explained variance and R^2 with the channels weighted by their variance, and the median of their own R^2.

    Channels in which the target is constant have no score and are left out. If all are, the three are 0.
    (torchmetrics' functions sum squares about zero, which loses the variance of a channel that is far from it, in
    float32.)

    Args:
        student: ``[N, C]``.
        teacher: ``[N, C]``, the target.
    """
    varies = (teacher != teacher[:1]).any(dim=0)
    error = student - teacher
    squared, left, variance = (
        varies * x.square().sum(dim=0) for x in (error, error - error.mean(dim=0), teacher - teacher.mean(dim=0))
    )
    explained, whole = (1 - each.sum() / variance.sum() for each in (left, squared))
    median = (1 - squared / variance).nanquantile(0.5)
    return tuple(torch.where(varies.any(), each, 0) for each in (explained, whole, median))  # type: ignore[return-value]
